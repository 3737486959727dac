"""The Triton backend's own functions: AMP's arguments, segments, per-tensor norms, and on a GPU
graphs, streams and the host's freedom. Runs in the interpreter's process, or on a GPU."""

import math
from collections.abc import Sequence

import pytest
import torch
from fusedclip.triton_kernels import interpreted
from torch import Tensor

import fusedclip
from fusedclip.backends import triton as backend
from fusedclip.backends import triton_gradients
from fusedclip.backends.triton_gradients import TritonGradients
from tests.helpers import (
    FLOAT_DTYPES,
    assert_norm,
    assert_scaled,
    exact_norm,
    parameters,
    same_bits,
)

DEVICE = "cpu" if interpreted() else "cuda"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no streams")
pytestmark = (
    []
    if interpreted()
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(backend.problem() != "", reason=backend.problem()),
    ]
)


def _mixed(count: int = 9, numel: int = 301) -> list[Tensor]:
    return [
        torch.randn(numel + i).to(DEVICE, FLOAT_DTYPES[i % len(FLOAT_DTYPES)]) for i in range(count)
    ]


def _gradients(grads: Sequence[Tensor]) -> TritonGradients:
    (taken,), rest = triton_gradients.take(list(enumerate(grads)), True)
    assert not rest
    return taken


def _clip(grads: Sequence[Tensor], max_norm: float | Tensor, **options: object) -> Tensor:
    arguments = {"infinity": False, "nonfinite": "propagate", **options}
    return backend.clip_(_gradients(grads), max_norm, **arguments)


@pytest.mark.parametrize("bites", [False, True])
def test_inv_scale_is_multiplied_in(bites: bool) -> None:
    """What the loss scale did is undone, whether the threshold bites or not."""
    grads = _mixed()
    before = [g.clone() for g in grads]
    norm = exact_norm([g.double() / 1024 for g in before])
    max_norm = norm / 2 if bites else 2 * norm
    inv_scale = torch.tensor(1 / 1024, device=DEVICE)
    result = _clip(grads, max_norm, inv_scale=inv_scale)
    assert_norm(result, norm, exact_products=False)
    for grad, old in zip(grads, before, strict=True):
        assert_scaled(grad, old, min(1.0, max_norm / (result.item() + 1e-6)) / 1024)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
@pytest.mark.parametrize("infinity", [False, True])
def test_found_inf(bad: float | None, infinity: bool) -> None:
    grads = _mixed()
    if bad is not None:
        grads[2][7] = bad
    found = torch.zeros((), device=DEVICE)
    _clip(grads, 1.0, infinity=infinity, found_inf=found)
    assert found.item() == (0.0 if bad is None else 1.0)


@pytest.mark.parametrize("infinity", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64,)], ids=str)
def test_norms_of_tensors_beside_the_clip(dtypes: tuple[torch.dtype, ...], infinity: bool) -> None:
    grads = [torch.randn(40 * i, device=DEVICE).to(dtypes[i % len(dtypes)]) for i in range(7)]
    order = math.inf if infinity else 2.0
    expected = [exact_norm([g], order) for g in grads]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    norms = torch.empty(len(grads), dtype=dtype, device=DEVICE)
    total = _clip(grads, 1.0, infinity=infinity, tensor_norms=norms)
    for norm, value in zip(norms, expected, strict=True):
        assert_norm(norm, value)
    # The total stays the norm of everything.
    assert_norm(total, max(expected) if infinity else math.hypot(*expected), exact_products=False)


@pytest.mark.parametrize("infinity", [False, True])
def test_measure_and_scale_by_segment(infinity: bool) -> None:
    grads = _mixed(8)
    before = [g.clone() for g in grads]
    segments = [3, 0, 3, 1, 0, 3, 1, 0]  # segment 2 is empty
    taken = _gradients(grads)
    totals = torch.empty(4, dtype=torch.float64, device=DEVICE)
    backend.measure(taken, segments, infinity=infinity, out=totals)
    assert all(same_bits(a, b) for a, b in zip(grads, before, strict=True))
    for segment in range(4):
        members = [g for g, s in zip(before, segments, strict=True) if s == segment]
        norm = exact_norm(members, math.inf if infinity else 2.0)
        expected = norm if infinity else norm**2
        assert totals[segment].item() == pytest.approx(expected, rel=1e-6)
    factors = torch.tensor([0.5, 1.0, 9.0, 0.25], dtype=torch.float64, device=DEVICE)
    backend.scale_(taken, segments, factors)
    for grad, old, segment in zip(grads, before, segments, strict=True):
        assert_scaled(grad, old, factors[segment].item())


def test_zero_fill_overwrites_nan() -> None:
    grads = _mixed(4)
    for grad in grads:
        grad[3] = math.nan
    taken = _gradients(grads)
    zero = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    backend.scale_(taken, None, zero)
    assert all(g.isnan().any() for g in grads)  # the twin: 0 · NaN is NaN
    backend.scale_(taken, None, zero, zero_fill=True)
    assert all(same_bits(g, torch.zeros_like(g)) for g in grads)


def test_the_threshold_on_the_device_is_not_rounded() -> None:
    """0.1 as fp64 and as fp32 differ by 1.5e-8 of it, which an fp64 gradient shows."""
    grads = [torch.randn(50, device=DEVICE, dtype=torch.float64)]
    before = grads[0].clone()
    limit = torch.tensor(0.1, device=DEVICE, dtype=torch.float64)
    _clip(grads, limit)
    assert_scaled(grads[0], before, 0.1 / (exact_norm([before]) + 1e-6))


def test_neighbours_are_not_touched() -> None:
    """Gradients at every offset inside larger memory, with values that would be noticed."""
    for dtype in FLOAT_DTYPES:
        memory = torch.full((40, 64), 7.0, dtype=dtype, device=DEVICE)
        spans = [(i % 9, 9 + (5 * i) % 50) for i in range(40)]
        grads = [memory[i, a:b] for i, (a, b) in enumerate(spans)]
        _clip(grads, 1.0)
        for i, (begin, end) in enumerate(spans):
            assert (memory[i, :begin] == 7.0).all() and (memory[i, end:] == 7.0).all()
            assert (memory[i, begin:end] < 7.0).all()


def test_the_same_bits_every_time() -> None:
    grads = _mixed(12, 20_000)
    copies = [g.clone() for g in grads]
    first, second = _clip(grads, 1.0), _clip(copies, 1.0)
    assert same_bits(first, second)
    assert all(same_bits(a, b) for a, b in zip(grads, copies, strict=True))


def test_what_the_kernels_leave_to_others() -> None:
    flat = torch.randn(100, device=DEVICE)
    odd = [
        flat[::2],
        torch.randn(4, device=DEVICE).to_sparse(),
        torch.randn(3, device=DEVICE, dtype=torch.complex64),
        torch.randn(3, device=DEVICE).to(torch.int32),
        torch._neg_view(torch.randn(3, device=DEVICE)),
        torch.zeros(8, device=DEVICE).as_strided((2, 2, 2), (1, 3, 3)),
    ]
    dense = [flat, torch.randn(2, 3, 4, device=DEVICE).permute(2, 0, 1), flat.new_empty(0)]
    (taken,), rest = triton_gradients.take(list(enumerate(odd + dense)), True)
    assert [index for index, _ in rest] == list(range(len(odd)))
    assert taken.indices == [6, 7, 8]


@needs_gpu
class TestOnAGpu:
    def test_nothing_waits_for_the_device(self) -> None:
        params = parameters(*_mixed())
        fusedclip.clip_(params, 1.0, backend="triton")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fusedclip.clip_(params, 0.5, backend="triton")
            fusedclip.clip_(params[:-1], 0.5, backend="triton")  # a table that is new
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_graph_replays_with_new_values(self) -> None:
        grads = _mixed()
        params = parameters(*grads)
        fusedclip.clip_(params, 1.0, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm = fusedclip.clip_(params, 1.0, backend="triton")
        for scale in (1.0, 100.0):
            values = [scale * torch.randn_like(g) for g in grads]
            for grad, value in zip(grads, values, strict=True):
                grad.copy_(value)
            fusedclip.clip_(parameters(torch.randn(5, device=DEVICE)), 1.0, backend="triton")
            graph.replay()
            assert_norm(norm, exact_norm(values), exact_products=False)
            assert exact_norm(grads) == pytest.approx(min(1.0, norm.item()), rel=1e-3)

    def test_streams_do_not_disturb_each_other(self) -> None:
        streams = [torch.cuda.Stream() for _ in range(3)]
        lists = [_mixed(20, 10_000) for _ in streams]
        expected = [exact_norm(grads) for grads in lists]
        torch.cuda.synchronize()
        norms = []
        for _ in range(20):
            for stream, grads in zip(streams, lists, strict=True):
                with torch.cuda.stream(stream):
                    norms.append(_clip(grads, math.inf))
        torch.cuda.synchronize()
        for i, norm in enumerate(norms):
            assert_norm(norm, expected[i % 3], exact_products=False)

    def test_the_barrier_holds_for_grids_of_any_size(self) -> None:
        """Thousands of launches over one counter, with grids of 1 to all programs."""
        lists = [torch.ones(n, 10_000, device=DEVICE).unbind() for n in (1, 2, 7, 50, 500)]
        for _ in range(500):
            for grads in lists:
                norm = _clip(grads, math.inf)
        assert norm.item() == pytest.approx(math.sqrt(500 * 10_000))

    def test_compiled(self) -> None:
        params = parameters(torch.tensor([3.0, 4.0], device=DEVICE))

        @torch.compile(fullgraph=True)
        def step() -> Tensor:
            return fusedclip.clip_(params, 1.0, backend="triton")

        assert step().item() == 5.0
        torch.testing.assert_close(params[0].grad.cpu(), torch.tensor([0.6, 0.8]))

    def test_more_than_2_to_the_31_elements(self) -> None:
        grad = torch.ones(2**31 + 100, dtype=torch.bfloat16, device=DEVICE)
        assert _clip([grad], 1.0).item() == pytest.approx(math.sqrt(grad.numel()), rel=1e-6)
        assert grad[-1].item() == pytest.approx(1 / math.sqrt(grad.numel()), rel=2**-8)
