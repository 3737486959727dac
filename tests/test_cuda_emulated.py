"""The CUDA kernels' own source, run on the CPU by tests/emulator with AddressSanitizer on.

The common suite runs over it as backend "cuda" in processes of its own, with small grids and
chunks, so that small tensors cross every border; thread schedules are drawn from a seed.
"""

from collections.abc import Iterator

import pytest

from tests.emulator import build
from tests.forked import Origin

pytestmark = pytest.mark.timeout(600)

_CONTRACT = ["test_accuracy.py", "test_semantics.py", "test_bad_input.py"]
_CALLERS = ["test_torch_dropin.py", "test_compile.py", "test_patch.py", "test_amp.py"]
_CALLERS += ["test_monitor.py"]


@pytest.fixture(scope="module")
def emulated() -> Iterator[Origin]:
    """With AddressSanitizer the import of torch takes twice as long."""
    environment = build.environment(build.build(), FUSEDCLIP_TEST_BACKENDS="cuda")
    origin = Origin("tests.emulator.plugin", "torch", "pytest", environment=environment)
    yield origin
    origin.end()


def _pytest(emulated: Origin, *arguments: str, **variables: str) -> str:
    command = ("-m", "pytest", "-q", "-p", "tests.emulator.plugin", *arguments)
    run = emulated.python(*command, env={**emulated.environment, **variables})
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


def test_the_common_suite(emulated: Origin) -> None:
    """64 threads, 3 blocks, chunks of 4 KiB, the last two of each warp kept in shared memory."""
    files = [f"tests/{name}" for name in _CONTRACT + _CALLERS]
    output = _pytest(
        emulated, *files, FUSEDCLIP_CUDA_LAYOUT="64,3,4096,16384,1", FUSEDCLIP_EMULATOR_SEED="1"
    )
    assert " passed" in output and "skipped" in output  # as outside; the reasons are said there


@pytest.mark.parametrize(
    "layout", ["32,2,512,512,1", "96,5,1024,0,2", ""], ids=["least", "odd", "real"]
)
def test_other_grids(emulated: Origin, layout: str) -> None:
    """One warp a block; three warps, a launch for each phase; the table in launch_shape.h."""
    _pytest(
        emulated, "tests/test_accuracy.py", "tests/test_semantics.py",
        "-k", "not Nonfinite and not twenty_thousand and not grow_with_size",
        FUSEDCLIP_CUDA_LAYOUT=layout, FUSEDCLIP_EMULATOR_SEED="2",
    )  # fmt: skip


def test_traffic_launches_and_failures(emulated: Origin) -> None:
    _pytest(emulated, "tests/emulator/inside.py")
