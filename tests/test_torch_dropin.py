"""The torch-named functions against torch's own: same arguments, results, warnings and errors."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad as torch_clip

import fusedclip
from tests.helpers import parameters

TORCH = {
    "clip_grad_norm_": torch_clip.clip_grad_norm_,
    "get_total_norm": torch_clip._get_total_norm,
    "clip_grads_with_norm_": torch_clip._clip_grads_with_norm_,
    "clip_grad_value_": torch_clip.clip_grad_value_,
}
ORDERS = [2, 2.0, "2", "inf", math.inf, -math.inf, 1, 0.5, 3, 0, -1, -2, torch.tensor(2.0)]
THRESHOLDS = [1.0, "0.5", torch.tensor(0.25), torch.tensor([0.5]), 1e9, 0, -1.0, math.nan, math.inf]


def _lists() -> dict[str, list[Tensor]]:
    torch.manual_seed(1)
    return {
        "fp32": [torch.randn(5, 3), torch.randn(7), torch.randn(())],
        "fp64": [torch.randn(5, dtype=torch.float64)],
        "mixed fp32 fp64": [torch.randn(5), torch.randn(4, dtype=torch.float64)],
        "with zeros": [torch.tensor([1.0, 2.0, 0.0]), torch.zeros(3)],
        "non-contiguous": [torch.randn(6, 6)[::2, 1::2], torch.randn(3, 4).t()],
        "nan": [torch.tensor([1.0, math.nan]), torch.randn(2)],
        "inf": [torch.tensor([1.0, math.inf]), torch.randn(2)],
    }


def _outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "returned", call()
    except Exception as error:
        return "raised", error


def _same(ours: tuple[str, Any], torchs: tuple[str, Any]) -> None:
    assert ours[0] == torchs[0], f"fusedclip {ours}, torch {torchs}"
    if ours[0] == "raised":
        # NotImplementedError is a RuntimeError: torch's choice between the two is an accident.
        kind = RuntimeError if isinstance(torchs[1], RuntimeError) else type(torchs[1])
        assert isinstance(ours[1], kind), f"fusedclip {ours[1]!r}, torch {torchs[1]!r}"
    elif torchs[1] is None:
        assert ours[1] is None
    else:
        assert ours[1].shape == torchs[1].shape
        assert ours[1].dtype == torchs[1].dtype
        torch.testing.assert_close(ours[1], torchs[1], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS, ids=repr)
@pytest.mark.parametrize("name", _lists())
def test_get_total_norm(name: str, order: Any) -> None:
    grads = _lists()[name]
    ours = _outcome(lambda: fusedclip.get_total_norm(grads, order))
    _same(ours, _outcome(lambda: TORCH["get_total_norm"](grads, order)))


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=repr)
@pytest.mark.parametrize("order", [2.0, math.inf, 1, 0, -1], ids=repr)
@pytest.mark.parametrize("name", _lists())
def test_clip_grad_norm_(name: str, order: Any, threshold: Any) -> None:
    if threshold == math.inf and name in ("inf", "nan"):
        pytest.skip("documented difference: max_norm=inf never writes")
    mine, theirs = parameters(*_lists()[name]), parameters(*_lists()[name])
    ours = _outcome(lambda: fusedclip.clip_grad_norm_(mine, threshold, order))
    _same(ours, _outcome(lambda: TORCH["clip_grad_norm_"](theirs, threshold, order)))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("total", [0.0, 0.5, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("threshold", ["1.0", 0, -2.0, 5])
def test_clip_grads_with_norm_(total: float, threshold: Any) -> None:
    mine, theirs = parameters(*_lists()["fp32"]), parameters(*_lists()["fp32"])
    ours = _outcome(lambda: fusedclip.clip_grads_with_norm_(mine, threshold, torch.tensor(total)))
    _same(
        ours,
        _outcome(lambda: TORCH["clip_grads_with_norm_"](theirs, threshold, torch.tensor(total))),
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [0.5, "0.1", 0, torch.tensor(0.3)], ids=repr)
def test_clip_grad_value_(value: Any) -> None:
    mine, theirs = parameters(*_lists()["fp32"], None), parameters(*_lists()["fp32"], None)
    assert fusedclip.clip_grad_value_(mine, value) is None
    TORCH["clip_grad_value_"](theirs, value)
    for a, b in zip(mine[:-1], theirs[:-1], strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("order", [2.0, math.inf, -math.inf, 1, 0, -1], ids=repr)
def test_empty_tensors(order: float) -> None:
    """torch has no infinity norm for an empty tensor; the drop-in raises too, before any change."""
    grads = [torch.randn(3), torch.zeros(0)]
    mine = parameters(*[g.clone() for g in grads])
    ours = _outcome(lambda: fusedclip.clip_grad_norm_(mine, 1e-3, order))
    theirs = parameters(*[g.clone() for g in grads])
    _same(ours, _outcome(lambda: TORCH["clip_grad_norm_"](theirs, 1e-3, order)))
    if ours[0] == "raised":
        assert torch.equal(mine[0].grad, grads[0])


@pytest.mark.parametrize(
    "grads",
    [[torch.ones(3, dtype=torch.int32)], [torch.ones(3).to(torch.float8_e4m3fn)]],
    ids=["int32", "float8"],
)
def test_dtypes_that_torch_refuses(grads: list[Tensor]) -> None:
    ours = _outcome(lambda: fusedclip.get_total_norm(grads))
    _same(ours, _outcome(lambda: TORCH["get_total_norm"](grads)))


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_sparse_coo(order: float) -> None:
    """Torch on the CPU needs foreach off for these; duplicate indices add up."""
    dense = torch.tensor([0.0, 3.0, 0.0, 4.0])
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.sparse_coo_tensor([[1, 1, 3]], [1.0, 2.0, 4.0], (4,), check_invariants=True)
    norm = fusedclip.clip_grad_norm_([p], 1.0, order)
    expected = torch.linalg.vector_norm(dense, order)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(p.grad.to_dense(), dense / (expected + 1e-6))


@pytest.mark.parametrize("name", ["nan", "inf"])
@pytest.mark.parametrize("order", [2.0, math.inf, 1.0])
def test_error_if_nonfinite(name: str, order: float) -> None:
    params = parameters(*_lists()[name])
    with pytest.raises(RuntimeError) as theirs:
        TORCH["clip_grad_norm_"](params, 1.0, order, True)
    with pytest.raises(RuntimeError) as ours:
        fusedclip.clip_grad_norm_(params, 1.0, order, error_if_nonfinite=True)
    assert str(ours.value).startswith(str(theirs.value))
    assert "grads[0] of shape (2,)" in str(ours.value)
    assert torch.equal(params[1].grad, _lists()[name][1])
    with pytest.raises(RuntimeError, match="grads"):
        fusedclip.get_total_norm([p.grad for p in params], order, error_if_nonfinite=True)


def test_only_an_empty_generator_warns() -> None:
    words = "`parameters` is an empty generator, no gradient clipping will occur."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fusedclip.clip_grad_norm_((p for p in []), 1.0)
    assert result == 0.0
    assert [str(w.message) for w in caught] == [words]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusedclip.clip_grad_norm_([], 1.0) == 0.0
        assert fusedclip.clip_grad_norm_(iter([]), 1.0) == 0.0
        assert fusedclip.clip_grad_norm_((p for p in parameters(None)), 1.0) == 0.0
        assert fusedclip.get_total_norm([]) == 0.0
        assert fusedclip.clip_grads_with_norm_([], 1.0, torch.tensor(1.0)) is None


def test_positional_arguments_and_foreach() -> None:
    for foreach in (None, True, False):
        params = parameters(torch.tensor([3.0, 4.0]))
        assert fusedclip.clip_grad_norm_(params, 1.0, 2.0, False, foreach) == 5.0
        fusedclip.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0), foreach)
        torch.testing.assert_close(params[0].grad, torch.tensor([0.3, 0.4]))
    assert fusedclip.get_total_norm(torch.tensor([3.0, 4.0]), 2.0, False, True) == 5.0


def test_bad_norm_types_raise_as_torch() -> None:
    params = parameters(torch.ones(2))
    for bad in ("x", None, [2]):
        with pytest.raises((ValueError, TypeError)) as theirs:
            TORCH["clip_grad_norm_"](params, 1.0, bad)
        with pytest.raises(theirs.type):
            fusedclip.clip_grad_norm_(params, 1.0, bad)


def test_overlapping_elements_raise_as_torch() -> None:
    params = parameters(torch.ones(1).expand(4))
    ours = _outcome(lambda: fusedclip.clip_grad_norm_(params, 1.0))
    _same(ours, _outcome(lambda: TORCH["clip_grad_norm_"](params, 1.0)))


def test_half_types_are_a_documented_difference() -> None:
    """Where the drop-in is better than torch: the norm of bf16 gradients is not rounded to bf16."""
    grads = [torch.full((9999,), 1.0, dtype=torch.bfloat16)]
    assert TORCH["get_total_norm"](grads).dtype == torch.bfloat16
    ours = fusedclip.get_total_norm(grads)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(math.sqrt(9999), rel=1e-6)
    assert fusedclip.get_total_norm([torch.tensor([1e20])]).item() == pytest.approx(1e20)
