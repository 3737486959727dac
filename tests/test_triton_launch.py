"""What the Triton backend hands to a device: grid, table, one compiled kernel; and host work."""

import functools
import gc
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fusedclip.triton_kernels import interpreted, launch
from fusedclip.triton_kernels.table import CODES, ROW, Table, lay_out, pack
from torch import Tensor

import fusedclip
from fusedclip import call
from fusedclip.backends import native, triton_gradients
from fusedclip.backends import triton as backend
from fusedclip.backends.triton_gradients import TritonGradients
from tests.helpers import FLOAT_DTYPES, parameters
from tests.pretended_gpu import MULTIPROCESSORS, TARGETS, PretendedGpu, pretended_gpu

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter has no launcher")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(TARGETS["sm_90"], monkeypatch) as gpu:
        yield gpu


def _gradients(*grads: Tensor) -> TritonGradients:
    (taken,), rest = triton_gradients.take(list(enumerate(grads)), True)
    assert not rest
    return taken


def _clip(*grads: Tensor, **options: object) -> Tensor:
    arguments = {"infinity": False, "nonfinite": "propagate", **options}
    return backend.clip_(_gradients(*grads), 1.0, **arguments)


def test_one_kernel_whatever_the_call(gpu: PretendedGpu) -> None:
    """Length, types, offsets, policies and AMP's arguments do not compile another one."""
    one = torch.ones(())
    _clip(torch.randn(7))
    for count in (1, 16, 300):
        _clip(*torch.randn(count, 5).unbind())
    for dtype in FLOAT_DTYPES:
        _clip(torch.randn(70_000).to(dtype)[1:])
    _clip(torch.randn(3), nonfinite="zero", inv_scale=one, found_inf=one)
    _clip(torch.randn(3), torch.randn(4), tensor_norms=torch.empty(2))
    grads = _gradients(torch.randn(5))
    backend.clip_(grads, torch.ones(()), infinity=False, nonfinite="error")
    backend.measure(grads, None, infinity=False, out=torch.empty(1, dtype=torch.float64))
    assert len(gpu.launches) == 12
    assert len(gpu.kernels) == 1
    _clip(torch.randn(3), infinity=True)  # the twin
    assert len(gpu.kernels) == 2


def test_one_cooperative_launch_that_leaves_multiprocessors_free(gpu: PretendedGpu) -> None:
    _clip(torch.randn(10_000_000), torch.randn(10))
    (launched,) = gpu.launches
    assert launched.cooperative
    assert launched.programs == MULTIPROCESSORS - MULTIPROCESSORS // 8
    assert launched.arguments["MEASURE"] and launched.arguments["FINISH"]
    _clip(torch.randn(10))
    assert gpu.launches[-1].programs == 1


def test_two_launches_without_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(TARGETS["gfx942"], monkeypatch) as gpu:
        _clip(torch.randn(100))
        first, second = gpu.launches
        assert not first.cooperative and not second.cooperative
        assert (first.arguments["MEASURE"], first.arguments["FINISH"]) == (True, False)
        assert (second.arguments["MEASURE"], second.arguments["FINISH"]) == (False, True)


def _check_two_launches(gpu: PretendedGpu, programs: int) -> None:
    phases = [(g.arguments["MEASURE"], g.arguments["FINISH"]) for g in gpu.launches]
    assert phases == [(True, False), (False, True)]
    assert not any(g.cooperative for g in gpu.launches)
    assert {g.programs for g in gpu.launches} == {programs}


def test_two_launches_of_a_long_list(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which leave no place for a barrier: two programs a multiprocessor."""
    monkeypatch.setattr(launch, "LONG_BYTES", 200_000)
    _clip(torch.randn(10_000_000))
    _check_two_launches(gpu, 2 * 116)
    place = launch.Place(0, 116, True)
    assert place.for_list(116 * 200_000 - 1) is place  # the twin
    assert not place.for_list(116 * 200_000).cooperative


@pytest.mark.parametrize("refusal", launch._REFUSALS)
def test_two_launches_where_a_grid_is_refused(gpu: PretendedGpu, refusal: str) -> None:
    gpu.refusal = refusal
    _clip(torch.randn(10))
    _check_two_launches(gpu, 1)


def test_other_errors_of_a_launch_are_errors(gpu: PretendedGpu) -> None:
    gpu.refusal = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _clip(torch.randn(10))
    assert not gpu.launches


def test_the_table_is_copied_only_when_it_changes(gpu: PretendedGpu) -> None:
    grads = list(torch.randn(20, 50).unbind())
    for _ in range(3):
        _clip(*grads)
    _clip(*grads[:-1])
    _clip(*grads)
    tables = [launched.arguments["table_ptr"].data_ptr() for launched in gpu.launches]
    assert tables[0] == tables[1] == tables[2]
    assert len({*tables[2:]}) >= 2
    words = [launched.arguments["table_ptr"] for launched in gpu.launches]
    assert torch.equal(words[0], words[-1]) and not torch.equal(words[0], words[3])


def _rows(table: Table) -> list[list[int]]:
    rows: list[list[int]] = table.words[: ROW * table.num_chunks].view(-1, ROW).tolist()
    return rows


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 5, 1000, 40_000])
def test_chunks_cover_each_element_once(dtype: torch.dtype, numel: int, offset: int) -> None:
    grad = torch.empty(numel + offset, dtype=dtype)[offset:]
    spans = pack([(grad.data_ptr(), numel, dtype)])
    chunk_bytes = 1024
    seen = []
    for address, begin, end, tag in _rows(lay_out(spans, None, 1, chunk_bytes, False)):
        assert address % 16 == 0
        assert tag == CODES[dtype]
        assert 0 <= begin * dtype.itemsize < 16 and end * dtype.itemsize <= chunk_bytes
        seen += range(address + begin * dtype.itemsize, address + end * dtype.itemsize)
    assert seen == list(range(grad.data_ptr(), grad.data_ptr() + grad.nbytes))


def test_chunks_are_ordered_by_segment() -> None:
    grads = [torch.empty(n) for n in (300, 1, 0, 600)]
    spans = pack((g.data_ptr(), g.numel(), g.dtype) for g in grads)
    table = lay_out(spans, (2, 0, 1, 0), 4, 1024, False)
    starts = table.words[ROW * table.num_chunks :].tolist()
    segments = [tag >> 2 for *_, tag in _rows(table)]
    assert starts == [segments.index(0), segments.count(0), segments.index(2), *[len(segments)] * 2]
    assert segments == sorted(segments)


def test_a_list_that_was_seen_is_found_again(gpu: PretendedGpu) -> None:
    grads = torch.randn(3, 4).unbind()
    one, other = (lay_out(_gradients(*grads).spans, None, 1, 1024, False) for _ in range(2))
    assert one is other
    assert lay_out(_gradients(*grads[:2]).spans, None, 1, 1024, False) is not one


def test_a_list_of_nothing_has_a_table() -> None:
    assert lay_out(pack([]), None, 2, 1024, False).words.tolist() == [0, 0, 0]


@pytest.mark.skipif(native.module is None, reason="needs the native module")
@pytest.mark.usefixtures("gpu")
class TestTheNativeGather:
    """It deals what the Python one deals."""

    @staticmethod
    def native(*grads: Tensor, deduplicate: bool = True) -> tuple[list[Any], list[Any]]:
        served = 1 << 1  # DLPack's number of the CPU
        return native.module.gather(list(grads), False, deduplicate, False, 0, served, None)[:2]

    def both(self, *grads: Tensor) -> None:
        taken, odd = self.native(*grads)
        expected, rest = triton_gradients.take(list(enumerate(grads)), True)
        assert [i for i, _ in odd] == [i for i, _ in rest]
        assert len(taken) == len(expected)
        for one, other in zip(taken, expected, strict=True):
            for name in (
                "indices", "spans", "total_bytes", "device", "has_float64", "has_float16",
                "has_empty", "backend",
            ):  # fmt: skip
                assert getattr(one, name) == getattr(other, name), name
            assert all(a is b for a, b in zip(one.tensors, other.tensors, strict=True))

    def test_all_kinds(self) -> None:
        dense = [torch.randn(3, 4).to(dtype) for dtype in FLOAT_DTYPES]
        views = [torch.randn(9)[1:], torch.randn(6, 5).t(), torch.randn(2, 3, 4, 4)[:, :, 0]]
        others = [torch.zeros(0), torch.zeros(()), torch.arange(3), torch.randn(3).to_sparse()]
        self.both(*dense, *views, *others, dense[0], dense[2])
        self.both()
        self.both(torch.randn(3).to_sparse())

    def test_off_the_border_of_an_element(self) -> None:
        memory = torch.zeros(64, dtype=torch.uint8)
        self.both(
            memory[1:33].view(torch.uint8),
            torch.frombuffer(bytearray(33), dtype=torch.float32, offset=1),
        )

    def test_the_spans_follow_the_memory(self) -> None:
        grads = torch.randn(2, 8).unbind()
        (one,), _ = self.native(*grads)
        first = one.spans
        assert first is one.spans
        (other,), _ = self.native(grads[1])
        assert other.spans == pack([(grads[1].data_ptr(), 8, torch.float32)])
        assert one.spans == first == pack((g.data_ptr(), 8, torch.float32) for g in grads)

    def test_an_overlap_is_refused(self) -> None:
        memory = torch.zeros(10)
        with pytest.raises(ValueError, match="overlap"):
            self.native(memory[:6], memory[4:])


def test_a_clip_is_one_native_call(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "problem", lambda: "")
    params = parameters(torch.tensor([3.0, 4.0]), torch.zeros(2))
    before = [p.grad._version for p in params]
    norm = fusedclip.clip_(params, 0.456, backend="triton")
    (launched,) = gpu.launches
    assert launched.arguments["norm_ptr"] is norm
    assert [p.grad._version for p in params] == [version + 1 for version in before]


def test_chunks_keep_every_program_busy() -> None:
    place = launch.Place(0, 116, True)
    tile = launch.ROWS * launch.THREADS * 16
    assert place.chunk_bytes(1000) == launch.MIN_CHUNK_BYTES >= tile
    for total in (1 << 20, 1 << 28, 1 << 33):
        size = place.chunk_bytes(total)
        assert size in (launch.MIN_CHUNK_BYTES, launch.MAX_CHUNK_BYTES) or (
            total / size >= place.programs * launch.ROUNDS
        )


def _python_calls(call: Callable[[], object]) -> int:
    """How many functions Python enters, its own and C's: host time in a unit that is exact."""
    entered = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    gc.disable()  # whose callbacks would count, now and then
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return entered


def test_host_work_of_a_call(gpu: PretendedGpu) -> None:
    """From the list to the driver's launch, with the table in place: address, size, type and the
    like of each tensor, and little that does not depend on their number."""
    work = {}
    for count in (300, 2000):
        grads = torch.randn(count, 16).unbind()
        _clip(*grads)
        work[count] = _python_calls(lambda grads=grads: _clip(*grads))
    each = (work[2000] - work[300]) / 1700
    assert 0 < each <= 8
    assert work[300] - 300 * each <= 100


def test_host_work_of_a_native_call(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it depends on the number of tensors."""
    monkeypatch.setattr(backend, "problem", lambda: "")
    monkeypatch.setattr(call, "listeners", call.Listeners())  # those of other tests would be told
    work = []
    for count in (300, 2000):
        params = parameters(*torch.randn(count, 16).unbind())
        # A threshold of its own: a call that was made where Triton cannot run is remembered.
        clip = functools.partial(fusedclip.clip_, params, 0.789, backend="triton")
        clip()
        work.append(_python_calls(clip))
    assert work[0] == work[1] <= 90


def test_the_threshold_travels_as_fp64(gpu: PretendedGpu) -> None:
    """Its bits, of which nothing is lost on the way."""
    for max_norm in (0.1, 1e-310, math.inf, math.nan, -1.0, 0.0):
        backend.clip_(_gradients(torch.ones(1)), max_norm, infinity=False, nonfinite="propagate")
        bits = torch.tensor(gpu.launches[-1].arguments["max_norm_bits"], dtype=torch.int64)
        expected = torch.tensor(max_norm, dtype=torch.float64)
        assert torch.equal(bits, expected.view(torch.int64))
