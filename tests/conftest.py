"""Fixtures: every backend under test, and a clean patch state.

FUSEDCLIP_TEST_BACKENDS names the backends, separated by commas; by default those that run on any
CPU. With "cuda" on a machine that has a GPU the whole suite makes its tensors there.
"""

import os
from collections.abc import Iterator

# Read as torch is loaded, here and in every process that a test starts: threads that wait for their
# team sleep. By default they spin, which on a busy machine takes the processor from the very thread
# that they wait for, and a test takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from fusedclip.triton_kernels import interpreted

import fusedclip
import tests.properties  # noqa: F401, hypothesis's profile

if interpreted():
    from tests import interpreter

    interpreter.improve()

BACKENDS = os.environ.get("FUSEDCLIP_TEST_BACKENDS", "reference,cpu").split(",")

ON_GPU = torch.cuda.is_available() and not {"cuda", "triton"}.isdisjoint(BACKENDS)


# With the longest first, and then in the order of their names, two workers end together.
_LONG = (
    "test_triton_interpreter.py", "test_cuda_emulated.py", "test_packaging.py",
    "test_planted_bugs.py", "test_sanitizers.py", "test_state_machine.py", "test_run.py",
    "test_distributed.py", "test_cli.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):  # else the mark would be an unknown one
        config.addinivalue_line("markers", "timeout: does nothing, pytest-timeout is not installed")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = fusedclip.available_backends()[request.param]
    if reason != "ok":
        pytest.fail(f"backend {request.param} must run where the tests run: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if ON_GPU:
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    fusedclip.unpatch()
    torch.set_num_threads(threads)
