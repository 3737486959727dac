"""Every backend against the exact result: shapes, dtypes, layouts, offsets, mixes, magnitudes."""

import math

import pytest
import torch
from torch import Tensor

import fusedclip
from tests.helpers import (
    FLOAT_DTYPES,
    SMALL,
    assert_norm,
    assert_scaled,
    clones,
    exact_coefficient,
    exact_norm,
    parameters,
)
from tests.properties import given, settings, st

_CHUNK = 65536

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 70)),
    st.tuples(st.integers(1, 9), st.integers(0, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
)
layouts = st.sampled_from(["contiguous", "offset", "transposed", "channels_last", "strided"])


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    shape = draw(shapes)
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    # The squares of a type as wide as fp32 leave the range of fp32 on both sides.
    narrow = torch.finfo(dtype).max < 1e18
    exponent = draw(st.integers(-6, 3) if narrow else st.integers(-32, 18))
    generator = torch.Generator(torch.get_default_device())
    generator.manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(layouts)
    numel = math.prod(shape)
    flat = torch.randn(2 * numel + 3, generator=generator, dtype=torch.float64) * 10.0**exponent
    flat = flat.to(dtype)
    if layout == "offset":
        return flat[3 : 3 + numel].view(shape)
    if layout == "strided":
        return flat[: 2 * numel : 2].view(shape) if len(shape) <= 1 else flat[:numel].view(shape)
    grad = flat[:numel].view(shape)
    if layout == "transposed" and len(shape) == 2:
        return grad.t()
    if layout == "channels_last" and len(shape) == 4:
        return grad.contiguous(memory_format=torch.channels_last)
    return grad


@given(
    grads=st.lists(gradients(), min_size=1, max_size=6),
    order=st.sampled_from([2.0, math.inf]),
    threshold=st.sampled_from([0.0, 0.25, 0.9, 1.1, 5.0, math.inf]),
)
@settings(max_examples=40 if SMALL else 150)
def test_random_lists(backend: str, grads: list[Tensor], order: float, threshold: float) -> None:
    params = parameters(*grads)
    before = clones(params)
    norm = exact_norm(before, order)
    max_norm = threshold * norm if norm and threshold != math.inf else threshold
    result = fusedclip.clip_(params, max_norm, order, backend=backend)
    only_fp64 = all(g.dtype == torch.float64 for g in grads)
    assert_norm(result, norm, exact_products=only_fp64)
    # The factor is as good as the norm it comes from.
    factor = exact_coefficient(norm if only_fp64 else result.item(), max_norm)
    for p, old in zip(params, before, strict=True):
        assert_scaled(p.grad, old, factor)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 15, 16, 17, 63, 64, 65, _CHUNK - 1, _CHUNK, _CHUNK + 1])
def test_sizes_around_lanes_and_chunks(backend: str, dtype: torch.dtype, numel: int) -> None:
    params = parameters(torch.randn(numel).to(dtype), torch.randn(3).to(dtype))
    before = clones(params)
    norm = exact_norm(before)
    assert_norm(fusedclip.clip_(params, 0.5 * norm, backend=backend), norm)
    for p, old in zip(params, before, strict=True):
        assert_scaled(p.grad, old, exact_coefficient(norm, 0.5 * norm))


@pytest.mark.parametrize("magnitude", [1e20, 3e37, 1e-30, 1e-40, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_gradients_have_a_finite_exact_norm(
    backend: str, dtype: torch.dtype, magnitude: float
) -> None:
    params = parameters(torch.full((40,), magnitude).to(dtype), torch.zeros(5, dtype=dtype))
    before = clones(params)
    assert_norm(fusedclip.clip_(params, math.inf, backend=backend), exact_norm(before))


def test_large_and_ordinary_chunks_together(backend: str) -> None:
    params = parameters(torch.randn(100_000), torch.full((3,), 2e30), torch.randn(10) * 1e-30)
    before = clones(params)
    norm = exact_norm(before)
    assert_norm(fusedclip.clip_(params, 1.0, backend=backend), norm)
    assert_scaled(params[1].grad, before[1], exact_coefficient(norm, 1.0))


def test_norm_is_not_rounded_to_bf16(backend: str) -> None:
    params = parameters(torch.ones(9999, dtype=torch.bfloat16))
    result = fusedclip.clip_(params, math.inf, backend=backend)
    assert result.dtype == torch.float32
    assert_norm(result, math.sqrt(9999))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_error_does_not_grow_with_size(backend: str, dtype: torch.dtype) -> None:
    """A constant tensor is the worst case for fp32 sums: every addition rounds the same way."""
    value = torch.tensor(0.1).to(dtype)
    numel = 500_000 if SMALL else 3_000_000
    params = parameters(value.expand(numel).clone())
    expected = abs(value.double().item()) * math.sqrt(numel)
    assert_norm(fusedclip.clip_(params, math.inf, backend=backend), expected)


def test_the_comparison_can_fail() -> None:
    """The twin: an error of one part in a million in the norm does not pass."""
    with pytest.raises(AssertionError):
        assert_norm(torch.tensor(1.0 + 1e-6), 1.0)
    with pytest.raises(AssertionError):
        assert_scaled(torch.tensor([1.0, 0.5]), torch.tensor([2.0, 2.0]), 0.5)


@pytest.mark.parametrize("order", [2.0, math.inf, 1.0, 3.0], ids=str)
def test_tensor_norms(order: float) -> None:
    tensors = [torch.randn(5, 7), torch.randn(70_000).bfloat16(), torch.zeros(4), torch.randn(3, 4)]
    norms = fusedclip.get_tensor_norms(tensors, order)
    assert norms.dtype == torch.float32
    for norm, tensor in zip(norms, tensors, strict=True):
        assert_norm(norm, exact_norm([tensor], order))


def test_tensor_norms_of_mixed_kinds_keep_their_places() -> None:
    dense = torch.randn(6)
    tensors = [dense, torch.randn(8, 8)[::2, ::2], dense, torch.randn(3, dtype=torch.float64)]
    norms = fusedclip.get_tensor_norms(tensors)
    assert norms.dtype == torch.float64
    expected = torch.tensor([exact_norm([t]) for t in tensors], dtype=torch.float64)
    torch.testing.assert_close(norms, expected, rtol=5e-7, atol=0)
