"""Which GPUs the CUDA backend serves, and what is said of the others; devices are made up."""

from collections.abc import Iterator

import pytest
import torch

from fusedclip.backends import cuda, native, select

_BUILT = ["sm_80", "sm_90", "compute_90"]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuda:0 of a kind that was built, cuda:1 of an older one."""

    class Module:
        GPU_DEVICE_TYPE = "cuda"

        @staticmethod
        def cuda_architectures() -> list[str]:
            return _BUILT

    monkeypatch.setattr(native, "module", Module)
    monkeypatch.setattr(native, "problem", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 0)][index])
    for function in (cuda.problem_of, cuda._usable_devices):
        function.cache_clear()
    yield
    for function in (cuda.problem_of, cuda._usable_devices):
        function.cache_clear()


@pytest.mark.parametrize(
    ("capability", "served"),
    [((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True), ((7, 5), False)],
    ids=str,
)
def test_machine_code_runs_within_its_major_version_and_ptx_on_later_ones(
    capability: tuple[int, int], served: bool
) -> None:
    assert cuda._supported(capability, _BUILT) == served


def test_without_ptx_later_architectures_are_not_served() -> None:
    assert not cuda._supported((10, 0), ["sm_80", "sm_90"])
    assert cuda._supported((9, 0), ["sm_90a"])


@pytest.mark.usefixtures("two_gpus")
def test_auto_takes_the_gpus_that_were_built_for() -> None:
    assert cuda.problem() == ""
    assert cuda.usable_devices() == 0b01
    assert select.resolve("auto").cuda_devices == 0b01


@pytest.mark.usefixtures("two_gpus")
def test_by_name_the_other_gpu_is_refused_with_the_reason() -> None:
    choice = select.resolve("cuda")
    assert choice.refusal(torch.device("cuda", 0)) == ""
    assert choice.refusal(torch.device("cuda", 1)) == (
        "cuda:1 is of compute capability 7.0, this build is for sm_80, sm_90, compute_90; "
        "reinstall with FUSEDCLIP_CUDA_ARCHS=70"
    )
    assert choice.refusal(torch.device("cpu")) == "it takes gradients on cuda"


@pytest.mark.usefixtures("two_gpus")
def test_nothing_is_asked_of_the_driver_before_cuda_is_initialised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("asked the driver"))
    assert cuda.usable_devices() == 0


@pytest.mark.usefixtures("two_gpus")
def test_no_gpu_that_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert "cuda:0 is of compute capability 7.0" in cuda.problem()
    assert "cuda:1 is of compute capability 7.0" in cuda.problem()
    assert cuda.usable_devices() == 0
