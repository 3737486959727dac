"""What only the emulator can see: bytes moved, launches made, failures on demand.

Run by tests/test_cuda_emulated.py in a process in which CPU tensors are the GPU's.
"""

import ctypes
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import amp
from fusedclip.backends import cuda, native, reference
from tests.helpers import (
    FLOAT_DTYPES,
    assert_norm,
    assert_scaled,
    clones,
    exact_norm,
    parameters,
    same_bits,
)

_emulator = ctypes.CDLL(os.environ["FUSEDCLIP_EMULATED_MODULE"])
_emulator.emulator_launches.restype = ctypes.c_int64

_NO_KERNEL_IMAGE = 209
_ILLEGAL_ADDRESS = 700
_OUT_OF_RESOURCES, _TOO_LARGE, _NOT_SUPPORTED = 701, 720, 801

# Block sums and the table's entries: what a call may move beside the gradients.
_OVERHEAD = 4096


@pytest.fixture(autouse=True)
def _layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", "64,3,1024,4096,1")
    yield


def _traffic(call: Callable[[], object]) -> tuple[int, int]:
    """(bytes read, bytes written) through the kernels' four access functions."""
    counts = (ctypes.c_int64 * 2)()
    _emulator.emulator_take_traffic(counts)
    call()
    _emulator.emulator_take_traffic(counts)
    return counts[0], counts[1]


def _launches(call: Callable[[], object]) -> int:
    before = _emulator.emulator_launches()
    call()
    return int(_emulator.emulator_launches() - before)


def _mixed(bytes_each: int) -> list[nn.Parameter]:
    return parameters(*(torch.randn(bytes_each // d.itemsize).to(d) for d in FLOAT_DTYPES))


def _total_bytes(params: list[nn.Parameter]) -> int:
    return sum(p.grad.nbytes for p in params)


@pytest.mark.parametrize("max_norm", [math.inf, 1e9], ids=["infinite", "finite"])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "error"])
def test_not_clipped_reads_once_and_writes_nothing(max_norm: float, nonfinite: str) -> None:
    params = _mixed(40_000)
    read, written = _traffic(lambda: fusedclip.clip_(params, max_norm, nonfinite=nonfinite))
    size = _total_bytes(params)
    assert size <= read <= size + _OVERHEAD
    assert written == 0


def test_clipped_moves_three_times_the_bytes_less_what_stays_on_chip() -> None:
    params = _mixed(40_000)
    read, written = _traffic(lambda: fusedclip.clip_(params, 0.1))
    size = _total_bytes(params)
    on_chip = 3 * 4096  # blocks × what each keeps
    assert written == size
    assert 2 * size - on_chip <= read <= 2 * size - on_chip + _OVERHEAD


def test_clipped_on_chip_reads_once() -> None:
    params = _mixed(1024)
    read, written = _traffic(lambda: fusedclip.clip_(params, 0.1))
    size = _total_bytes(params)
    assert written == size
    assert size <= read <= size + _OVERHEAD


def test_the_count_sees_a_second_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: with nothing kept on chip the same list is read twice."""
    monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", "64,3,1024,0,1")
    params = _mixed(1024)
    read, _ = _traffic(lambda: fusedclip.clip_(params, 0.1))
    assert read >= 2 * _total_bytes(params)


def test_scaling_by_one_reads_and_writes_nothing() -> None:
    params = _mixed(8192)
    gradients = _gathered(params)
    one = torch.ones(1, dtype=torch.float64)
    assert _traffic(lambda: cuda.scale_(gradients, None, one)) == (0, 0)
    read, written = _traffic(lambda: cuda.scale_(gradients, None, one / 2))
    assert read == written == _total_bytes(params)


def test_what_is_in_one_precision_is_not_touched() -> None:
    """A factor that is 1 in fp32 leaves fp32 alone and scales fp64."""
    params = parameters(torch.ones(1000), torch.ones(1000, dtype=torch.float64))
    factor = torch.tensor([1 - 2.0**-40], dtype=torch.float64)
    _, written = _traffic(lambda: cuda.scale_(_gathered(params), None, factor))
    assert written == 8000


def test_one_launch_a_call() -> None:
    params = _mixed(4096)
    assert _launches(lambda: fusedclip.clip_(params, 0.1)) == 1
    assert _launches(lambda: fusedclip.get_total_norm([p.grad for p in params])) == 1
    assert _launches(lambda: fusedclip.get_tensor_norms([p.grad for p in params])) == 1
    assert _launches(lambda: _clip_by_segment(params)) == 1


def _clip_by_segment(params: list[nn.Parameter], segments: int = 2) -> None:
    limits = torch.full((segments,), 0.1, dtype=torch.float64)
    numbers = [i % segments for i in range(len(params))]
    cuda.clip_(_gathered(params), limits, segments=numbers, infinity=False, nonfinite="propagate")


@pytest.mark.parametrize("refused", [False, True], ids=["long lists", "a grid that does not fit"])
def test_a_launch_for_each_phase(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as in one launch; N bytes more where something is clipped and would be kept."""
    params, fused = _mixed(40_000), _mixed(40_000)
    for p, twin in zip(params, fused, strict=True):
        twin.grad = p.grad.clone()
    size = _total_bytes(params)
    norm = fusedclip.clip_(fused, 0.1)
    fit = 2 if refused else -1  # blocks, of three
    if not refused:
        monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", "64,3,1024,0,2")
    _emulator.emulator_fit_cooperative(fit)
    try:
        unclipped = _traffic(lambda: fusedclip.clip_(params, math.inf))
        assert size <= unclipped[0] <= size + _OVERHEAD and unclipped[1] == 0
        assert _launches(lambda: fusedclip.clip_(params, math.inf)) == 2
        assert _launches(lambda: fusedclip.get_total_norm([p.grad for p in params])) == 2
        assert _launches(lambda: fusedclip.get_tensor_norms([p.grad for p in params])) == 2
        assert _launches(lambda: _clip_by_segment(_mixed(100))) == 3
        result: list[Tensor] = []
        read, written = _traffic(lambda: result.append(fusedclip.clip_(params, 0.1)))
    finally:
        _emulator.emulator_fit_cooperative(-1)
    assert 2 * size <= read <= 2 * size + _OVERHEAD and written == size
    assert same_bits(result[0], norm)
    assert all(same_bits(p.grad, twin.grad) for p, twin in zip(params, fused, strict=True))


@pytest.mark.parametrize("error", [_OUT_OF_RESOURCES, _TOO_LARGE, _NOT_SUPPORTED])
def test_a_refused_grid_is_no_error(error: int) -> None:
    params = _mixed(4096)
    before = clones(params)
    _emulator.emulator_fail_next_launch(error)
    assert_norm(fusedclip.clip_(params, 0.1), exact_norm(before), exact_products=False)


def test_two_blocks_fit_a_multiprocessor_with_all_that_they_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight blocks of 100 KiB on four: only where all of a multiprocessor's memory is set aside."""
    monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", "64,8,4096,102400,1")
    params = parameters(torch.randn(1_000_000))
    for infinity in (False, True):  # a kernel each, which have to ask each
        order = math.inf if infinity else 2.0
        assert _launches(lambda order=order: fusedclip.clip_(params, 0.1, order)) == 1


def test_measuring_alone_needs_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where clipping is refused for what it would keep."""
    monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", "64,8,4096,204800,1")
    params = parameters(torch.randn(1_000_000))
    assert _launches(lambda: fusedclip.get_total_norm([p.grad for p in params])) == 1
    assert _launches(lambda: fusedclip.clip_(params, 0.1)) == 2


def test_zeros_are_written_without_a_look_at_what_was_there() -> None:
    params = _mixed(8192)
    params[1].grad[17] = math.nan
    read, written = _traffic(lambda: fusedclip.clip_(params, 1.0, nonfinite="zero"))
    size = _total_bytes(params)
    assert size <= read <= size + _OVERHEAD and written == size
    assert all(not p.grad.any() for p in params)


def test_a_long_table_is_written_once_while_the_pointers_stay() -> None:
    params = parameters(*torch.randn(3000, 5).unbind())
    call = lambda: fusedclip.clip_(params, 1e9)  # noqa: E731
    per_launch = 1344  # entries that the kernel's parameters hold, of 3,000 and one that ends them
    assert _launches(call) == 1 + math.ceil(3001 / per_launch)
    assert _launches(call) == 1
    params[1700].grad = torch.randn(5) * 100
    assert _launches(call) > 1
    assert_norm(call(), exact_norm([p.grad for p in params]))


def test_the_layout_that_is_used_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = _gathered(parameters(torch.randn(10_000)))
    one_chunk_each = (("64,3,1024,4096,1", 4096), ("32,2,8192,90000,1", 3 * 8192))
    for text, resident in one_chunk_each:
        monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", text)  # read at each call
        gradients.prepare(False, None, 1, False)
        threads, blocks, chunk, _, launches = map(int, text.split(","))
        assert gradients.layout() == (threads, blocks, chunk, resident, launches)


@pytest.mark.parametrize("most", [160, 448, 1344])
def test_around_the_longest_list_of_each_table(most: int) -> None:
    for count in (most - 1, most, most + 1):
        params = parameters(*torch.randn(count, 2).unbind())
        norm = exact_norm([p.grad for p in params])
        assert_norm(fusedclip.clip_(params, 1.0), norm)


_OLD_DRIVER = """
import ctypes, os, torch, fusedclip
ctypes.CDLL(os.environ["FUSEDCLIP_EMULATED_MODULE"]).emulator_set_driver(12000)
for count in (160, 161, 400):
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(3)
    norm = fusedclip.clip_(params, 1.0, backend="cuda")
    assert abs(norm.item() ** 2 - 3 * count) < 1e-3, norm
"""


def test_a_driver_that_takes_4_kib_of_parameters() -> None:
    """Lists of more than 160 gradients have a table on the device there, written in such parts."""
    run = subprocess.run(
        [sys.executable, "-c", "import tests.emulator.plugin\n" + _OLD_DRIVER],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def test_that_driver_refuses_larger_ones() -> None:
    """The twin: the emulator says so where the library did not ask for the driver's version."""
    _emulator.emulator_set_driver(12000)
    try:
        with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
            fusedclip.clip_(parameters(*torch.randn(161, 2).unbind()), 1.0)
    finally:
        _emulator.emulator_set_driver(13000)


def test_what_is_not_listed_takes_no_place_in_the_table() -> None:
    """Empty gradients, as most are of a rank of sharded training."""
    params = parameters(torch.randn(50), *[torch.empty(0)] * 2000, torch.randn(3))
    grads = _gathered(params)
    assert grads.prepare(False, None, 1, False)[1] == 0  # in the parameters
    norm = exact_norm([p.grad for p in params])
    assert_norm(fusedclip.clip_(params, 1.0), norm)
    each = fusedclip.get_tensor_norms([p.grad for p in params])
    assert (each[1:-1] == 0).all() and (each[[0, -1]] > 0).all()


@pytest.mark.parametrize("error", [_NO_KERNEL_IMAGE, _ILLEGAL_ADDRESS])
def test_a_failed_launch_is_reported_and_leaves_everything(error: int) -> None:
    params = _mixed(4096)
    before = clones(params)
    _emulator.emulator_fail_next_launch(error)
    with pytest.raises(RuntimeError, match=r"cudaLaunchCooperativeKernel on cuda:0 failed") as info:
        fusedclip.clip_(params, 0.1)
    assert ("FUSEDCLIP_CUDA_ARCHS" in str(info.value)) == (error == _NO_KERNEL_IMAGE)
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))
    assert_norm(fusedclip.clip_(params, 0.1), exact_norm(before), exact_products=False)


_NO_LAYOUTS = [
    "64", "64,3,1024,2", "63,3,1024,0,1", "512,3,1024,0,1", "64,0,1024,0,1", "64,1,8,0,1",
    "64,3,1024,0,3", "64,3,1024,1024,2",
]  # fmt: skip


@pytest.mark.parametrize("layout", _NO_LAYOUTS)
def test_a_layout_by_hand_is_checked(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", layout)
    with pytest.raises(ValueError, match="FUSEDCLIP_CUDA_LAYOUT: expected threads,blocks"):
        fusedclip.clip_(parameters(torch.randn(10)), 1.0)


@pytest.mark.parametrize("bits", ["64,3,1024,4096,1", "64,3,1024,0,2", "32,5,1024,1024,1"])
def test_bits_do_not_depend_on_the_schedule(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", bits)
    results = []
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("FUSEDCLIP_EMULATOR_SEED", seed)
        torch.manual_seed(0)
        params = _mixed(10_000)
        results.append([fusedclip.clip_(params, 1.0), *(p.grad for p in params)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("infinity", [False, True], ids=["l2", "inf"])
def test_unscale_tensor_norms_and_found_inf_in_the_same_pass(infinity: bool) -> None:
    params = _mixed(5000)
    before = clones(params)
    inverse = torch.tensor(1 / 1024)
    each = torch.empty(len(params), dtype=torch.float64)
    found = torch.zeros(())
    order = math.inf if infinity else 2.0
    norm = cuda.clip_(
        _gathered(params), 0.001, infinity=infinity, nonfinite="propagate", inv_scale=inverse,
        tensor_norms=each, found_inf=found,
    )  # fmt: skip
    unscaled = [g.double() / 1024 for g in before if g is not None]
    assert_norm(norm, exact_norm(unscaled, order), exact_products=False)
    for value, grad in zip(each, unscaled, strict=True):
        assert_norm(value, exact_norm([grad], order), exact_products=False)
    assert found == 0
    factor = 0.001 / (norm.item() + 1e-6) / 1024
    for p, old in zip(params, before, strict=True):
        assert_scaled(p.grad, old, factor)

    params[2].grad[7] = math.nan
    cuda.clip_(_gathered(params), 0.01, infinity=infinity, nonfinite="error", found_inf=found)
    assert found == 1


def test_unscaling_is_done_below_the_threshold_too() -> None:
    params = parameters(torch.full((100,), 8.0))
    inverse = torch.tensor(0.125)
    norm = cuda.clip_(
        _gathered(params), 1e9, infinity=False, nonfinite="propagate", inv_scale=inverse
    )
    assert norm == 10
    assert (params[0].grad == 1).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_unclipped_is_unscaled_alone(bad: float) -> None:
    grad = torch.full((100,), 8.0)
    grad[3] = bad
    params, inverse = parameters(grad, torch.full((5,), 16.0)), torch.tensor(0.125)
    cuda.clip_(_gathered(params), 0.1, infinity=False, nonfinite="unclipped", inv_scale=inverse)
    assert (params[0].grad[4:] == 1).all() and (params[1].grad == 2).all()
    assert not params[0].grad[3].isfinite()


def test_mixed_precision_is_one_launch_that_moves_3n() -> None:
    params = _mixed(40_000)
    params = [p for p in params if p.dtype != torch.float16]
    scaler = amp.GradScaler("cpu", init_scale=1024.0, max_norm=0.1)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD(params, lr=0.1)
    launches = 0

    def unscale() -> None:
        nonlocal launches
        launches = _launches(lambda: scaler.unscale_(optimizer))

    read, written = _traffic(unscale)
    assert launches == 1
    assert written == _total_bytes(params)
    assert written < read <= 2 * written + _OVERHEAD


def test_mixed_precision_with_a_fused_optimizer_is_one_launch_that_reads_n() -> None:
    params = parameters(torch.randn(10_000), torch.randn(77))
    scaler = amp.GradScaler("cpu", init_scale=1024.0, max_norm=0.1)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.AdamW(params, fused=True)
    launches = 0

    def step() -> None:
        nonlocal launches
        launches = _launches(lambda: scaler.step(optimizer))

    read, written = _traffic(step)
    assert launches == 1 and written <= _OVERHEAD
    assert _total_bytes(params) <= read <= _total_bytes(params) + _OVERHEAD


def test_a_threshold_on_the_device() -> None:
    params = parameters(torch.tensor([3.0, 4.0]))
    cuda.clip_(_gathered(params), torch.tensor(1.0), infinity=False, nonfinite="propagate")
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("infinity", [False, True], ids=["l2", "inf"])
def test_segments_as_the_reference_has_them(infinity: bool) -> None:
    params = parameters(*(torch.randn(n).to(d) for n in (5, 3000, 1) for d in FLOAT_DTYPES))
    grads = [p.grad for p in params]
    segments = [(7 * i) % 4 for i in range(len(grads))]
    segments[5] = reference.NOT_COUNTED
    wanted, got = (torch.empty(5, dtype=torch.float64) for _ in range(2))
    listed = reference.ReferenceGradients(grads, list(range(len(grads))), grads[0].device)
    reference.measure(listed, segments, infinity=infinity, out=wanted)
    cuda.measure(_gathered(params), segments, infinity=infinity, out=got)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)

    before = clones(params)
    factors = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    segments[5] = 1
    cuda.scale_(_gathered(params), segments, factors)
    for p, old, segment in zip(params, before, segments, strict=True):
        assert_scaled(p.grad, old, factors[segment].item())


def test_zeros_are_no_reason_for_a_second_sum() -> None:
    """All zeros and a few ordinary values: exact, though their sum is below the trusted range."""
    grad = torch.zeros(5000)
    grad[4321] = 3.0
    assert fusedclip.clip_(parameters(grad), math.inf) == 3.0
    assert fusedclip.clip_(parameters(torch.zeros(5000)), 1.0) == 0.0


def test_threads_at_once() -> None:
    """Each with lists of its own, long ones too, which share the cached table."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for count in (3, 1400, 5, 1500):
                params = parameters(*torch.randn(count, 4, generator=generator).unbind())
                norm = exact_norm([p.grad for p in params])
                assert_norm(fusedclip.clip_(params, 1.0, backend="cuda"), norm)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _gathered(params: list[nn.Parameter]) -> Tensor:
    (gradients,), odd, _ = native.module.gather(params, True, True, False, 1, 0, None)
    assert not odd
    return gradients
