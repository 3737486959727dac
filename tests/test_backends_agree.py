"""The backends against each other: one contract, written down several times."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedclip
from tests.conftest import BACKENDS
from tests.helpers import (
    ELEMENT_ATOL,
    ELEMENT_RTOL,
    FLOAT_DTYPES,
    NORM_RTOL,
    SMALL,
    parameters,
    same_bits,
)

ALL = list(dict.fromkeys(["reference", "cpu", *BACKENDS]))


@st.composite
def lists(draw: st.DrawFn) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=5))
    dtypes = draw(st.lists(st.sampled_from(FLOAT_DTYPES), min_size=5, max_size=5))
    magnitude = 10.0 ** draw(st.integers(-4, 3))
    return [
        (magnitude * torch.randn(size, generator=generator)).to(dtype)
        for size, dtype in zip(sizes, dtypes, strict=False)
    ]


def _clip(grads: list[Tensor], max_norm: float, order: float, backend: str) -> list[Tensor]:
    """[norm, gradients after it]"""
    params = parameters(*[grad.clone() for grad in grads])
    norm = fusedclip.clip_(params, max_norm, order, backend=backend)
    return [norm, *(p.grad for p in params if p.grad is not None)]


@given(grads=lists(), order=st.sampled_from([2.0, math.inf]), threshold=st.floats(0.1, 2.0))
@settings(max_examples=25 if SMALL else 100)
def test_norms_and_gradients(grads: list[Tensor], order: float, threshold: float) -> None:
    norm = _clip(grads, math.inf, order, "reference")[0].item()
    results = [_clip(grads, threshold * norm, order, backend) for backend in ALL]
    for one, other in itertools.combinations(results, 2):
        for a, b, kind in zip(one, other, ["norm", *["gradient"] * len(grads)], strict=True):
            assert a.dtype == b.dtype
            # In a mixed list the norm is as exact as its fp32 members.
            rtol = NORM_RTOL[torch.float32] + (0 if kind == "norm" else ELEMENT_RTOL[a.dtype])
            atol = 2 * ELEMENT_ATOL[a.dtype]
            torch.testing.assert_close(a.double(), b.double(), rtol=2 * rtol, atol=atol)


# 3·3 + 4·4 = 5·5 in every type: the norm is exactly 5 for every backend, and the threshold at which
# the coefficient 5.000001 / (5 + 1e-6) becomes 1 is known to the last bit.
_BORDER = 5.0 + 1e-6
_THRESHOLDS = {
    "far below": 2.0,  # rounding to the shortest type cannot undo it
    "an ulp of fp32 below": _BORDER * (1 - 2.0**-23),
    "an ulp of fp64 below": math.nextafter(_BORDER, 0.0),
    "at": _BORDER,
    "an ulp of fp64 above": math.nextafter(_BORDER, 9.0),
    "an ulp of fp32 above": _BORDER * (1 + 2.0**-23),
}


@pytest.mark.parametrize("order", [2.0, math.inf], ids=str)
@pytest.mark.parametrize("threshold", _THRESHOLDS)
@pytest.mark.parametrize("dtypes", [*[(t, t) for t in FLOAT_DTYPES], FLOAT_DTYPES[:2]], ids=str)
def test_the_decision(dtypes: tuple[torch.dtype, ...], threshold: str, order: float) -> None:
    """Bit for bit the same gradients: clipped by all backends or by none."""
    values = (3.0, 4.0) if order == 2.0 else (3.0, 5.0)
    grads = [torch.tensor([v], dtype=t) for v, t in zip(values, dtypes, strict=True)]
    results = [_clip(grads, _THRESHOLDS[threshold], order, backend) for backend in ALL]
    for result in results:
        assert result[0].item() == 5.0
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))
    touched = [
        not same_bits(after, before)
        for result in results
        for after, before in zip(result[1:], grads, strict=True)
    ]
    if threshold == "far below":
        assert all(touched)
    if threshold in ("at", "an ulp of fp64 above", "an ulp of fp32 above"):
        assert not any(touched)
    if threshold == "an ulp of fp64 below" and set(dtypes) == {torch.float64}:
        assert any(touched)  # the twin: one step of the threshold makes the difference


@given(grads=lists(), side=st.sampled_from([-1, 1]))
@settings(max_examples=15 if SMALL else 60)
def test_the_decision_on_random_lists(grads: list[Tensor], side: int) -> None:
    """A millionth beside the border, twice what the norms may differ by, all decide alike."""
    grads = [grad.double() for grad in grads]
    norm = _clip(grads, math.inf, 2.0, "reference")[0].item()
    max_norm = (norm + 1e-6) * (1 + side * 1e-6)
    for backend in ALL:
        after = _clip(grads, max_norm, 2.0, backend)[1:]
        touched = [not same_bits(a, b) for a, b in zip(after, grads, strict=True)]
        assert any(touched) == (side < 0 and norm > 0), backend
