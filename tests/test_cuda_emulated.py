"""The CUDA kernels' own source, run on the CPU by tests/emulator with AddressSanitizer on.

The common suite runs over it as backend "cuda" in processes of its own, with small grids and
chunks, so that small tensors cross every border; thread schedules are drawn from a seed.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator import build

pytestmark = pytest.mark.timeout(600)

_ROOT = Path(__file__).parent.parent
_CONTRACT = ["test_accuracy.py", "test_semantics.py", "test_bad_input.py"]
_CALLERS = ["test_torch_dropin.py", "test_compile.py", "test_patch.py", "test_amp.py"]
_CALLERS += ["test_monitor.py"]


@pytest.fixture(scope="module")
def module() -> Path:
    return build.build()


def _pytest(module: Path, *arguments: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulator.plugin", *arguments],
        env=build.environment(module, FUSEDCLIP_TEST_BACKENDS="cuda", **variables),
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


def test_the_common_suite(module: Path) -> None:
    """64 threads, 3 blocks, chunks of 4 KiB, the last two of each warp kept in shared memory."""
    files = [f"tests/{name}" for name in _CONTRACT + _CALLERS]
    output = _pytest(
        module, *files, FUSEDCLIP_CUDA_LAYOUT="64,3,4096,16384,1", FUSEDCLIP_EMULATOR_SEED="1"
    )
    assert " passed" in output and "skipped" in output  # as outside; the reasons are said there


@pytest.mark.parametrize(
    "layout", ["32,2,512,512,1", "96,5,1024,0,2", ""], ids=["least", "odd", "real"]
)
def test_other_grids(module: Path, layout: str) -> None:
    """One warp a block; three warps, a launch for each phase; the table in launch_shape.h."""
    _pytest(
        module, "tests/test_accuracy.py", "tests/test_semantics.py",
        "-k", "not Nonfinite and not twenty_thousand and not grow_with_size",
        FUSEDCLIP_CUDA_LAYOUT=layout, FUSEDCLIP_EMULATOR_SEED="2",
    )  # fmt: skip


def test_traffic_launches_and_failures(module: Path) -> None:
    _pytest(module, "tests/emulator/inside.py")
