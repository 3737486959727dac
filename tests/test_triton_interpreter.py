"""The common suite over the Triton backend, by Triton's interpreter, in a process of its own.

TRITON_INTERPRET=1 counts when kernels are made, so it cannot be set for one test. The same tests
run over other backends with FUSEDCLIP_TEST_BACKENDS, FUSEDCLIP_BACKEND and FUSEDCLIP_TEST_SMALL.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fusedclip.triton_kernels import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="this is that process")

_TESTS = Path(__file__).parent
_SUITE = (
    "test_accuracy", "test_amp", "test_backends_agree", "test_bad_input", "test_compile",
    "test_monitor", "test_semantics", "test_torch_dropin", "test_triton_backend",
)  # fmt: skip


def _pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "TRITON_INTERPRET": "1",
        "FUSEDCLIP_BACKEND": "triton",  # what "auto" and the torch-named functions mean
        "FUSEDCLIP_TEST_BACKENDS": "triton",
        "FUSEDCLIP_TEST_SMALL": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, **settings, **environment},
        cwd=_TESTS.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(900)
def test_common_suite() -> None:
    done = _pytest(*(str(_TESTS / f"{name}.py") for name in _SUITE))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 500, done.stdout[-500:]


def test_the_suite_fails_with_a_broken_kernel(tmp_path: Path) -> None:
    """The twin: kernels whose rescue of overflow is switched off do not pass."""
    (tmp_path / "broken_kernels.py").write_text(
        "from fusedclip.triton_kernels import chunks\n"
        "import triton.language as tl\n"
        "chunks._INFINITY = tl.constexpr(-1.0)\n"
    )
    test = "test_finite_gradients_have_a_finite_exact_norm"
    done = _pytest(str(_TESTS / "test_accuracy.py"), "-k", test, "-p", "broken_kernels",
                   PYTHONPATH=str(tmp_path))  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1e+20" in done.stdout and "failed" in done.stdout
