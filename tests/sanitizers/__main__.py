"""The suite over the whole native module with sanitizers: ``python -m tests.sanitizers``.

The module is built once more, with AddressSanitizer and UndefinedBehaviorSanitizer and without
CUDA, and takes the place of the installed one. Arguments go to pytest; ``--json PATH`` first writes
what was run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
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
    report = None
    if arguments[:1] == ["--json"]:
        report, arguments = Path(arguments[1]), arguments[2:]
    module = build()
    files = [] if any(not a.startswith("-") for a in arguments) else [f"tests/{t}" for t in _TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulator.plugin"]
    environment = emulator.environment(
        module,
        FUSEDCLIP_TEST_BACKENDS="cpu",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command += [f"--junitxml={results}", *files, *arguments]
        status = subprocess.run(command, env=environment, cwd=_ROOT).returncode
        (suite,) = xml.etree.ElementTree.parse(results).getroot()
    if report is not None:
        record = {
            "sanitizers": _NAMES,
            "tests": int(suite.attrib["tests"]) - int(suite.attrib["skipped"]),
            "failed": int(suite.attrib["failures"]) + int(suite.attrib["errors"]),
            "seconds": time.perf_counter() - start,
        }
        report.write_text(json.dumps(record) + "\n")
    return status


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
