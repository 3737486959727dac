"""The suite over the whole native module with sanitizers: ``python -m tests.sanitizers``.

The module is built once more, with AddressSanitizer and UndefinedBehaviorSanitizer and without
CUDA, and takes the place of the installed one. Arguments go to pytest.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.emulator import build as emulator

_ROOT = Path(__file__).parents[2]
_NAMES = "address,undefined"
_FOLDER = _ROOT / "build" / "sanitized"

# What calls the CPU kernels and the binding in this process.
_TESTS = (
    "test_accuracy.py", "test_amp.py", "test_attachment.py", "test_backends_agree.py",
    "test_bad_input.py", "test_clip_value.py", "test_policies.py", "test_reproducibility.py",
    "test_scopes.py", "test_semantics.py", "test_torch_dropin.py",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    module = build()
    files = [] if any(not a.startswith("-") for a in arguments) else [f"tests/{t}" for t in _TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulator.plugin"]
    environment = emulator.environment(
        module,
        FUSEDCLIP_TEST_BACKENDS="cpu",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    return subprocess.run([*command, *files, *arguments], env=environment, cwd=_ROOT).returncode


def build() -> Path:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(_FOLDER)],
        env={
            **os.environ,
            "FUSEDCLIP_SANITIZE": _NAMES,
            "FUSEDCLIP_CUDA": "0",
            "FUSEDCLIP_REQUIRE_NATIVE": "1",
        },
        cwd=_ROOT,
        check=True,
    )
    (module,) = _FOLDER.glob("fusedclip/_C*.so")
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
