"""``fusedclip.integrations.apex``: apex's signatures, its overflow buffer, any mix of dtypes."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from fusedclip.backends import cpu
from fusedclip.integrations.apex import (
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)
from tests.helpers import ELEMENT_ATOL, ELEMENT_RTOL, FLOAT_DTYPES, exact_norm, same_bits

_SIZES = ((9_001,), (3, 5), (), (0,), (2, 1, 7))


def _tensors(*dtypes: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator).to(dtypes[i % len(dtypes)])
        for i, size in enumerate(_SIZES)
    ]


def _flag() -> Tensor:
    return torch.zeros(1, dtype=torch.int)


@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOAT_DTYPES), FLOAT_DTYPES], ids=str)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_l2norm(dtypes: tuple[torch.dtype, ...], per_tensor: bool) -> None:
    tensors, flag = _tensors(*dtypes), _flag()
    norm, each = multi_tensor_applier(multi_tensor_l2norm, flag, [tensors], per_tensor)
    assert norm.shape == (1,) and norm.dtype == each.dtype == torch.float32
    assert norm.item() == pytest.approx(exact_norm(tensors), rel=5e-7)
    assert each.shape == ((len(tensors),) if per_tensor else (0,))
    for value, tensor in zip(each.tolist(), tensors, strict=per_tensor):
        assert value == pytest.approx(exact_norm([tensor]), rel=5e-7)
    assert flag.item() == 0


def test_l2norm_without_the_last_argument_is_of_the_whole_list() -> None:
    norm, each = multi_tensor_applier(multi_tensor_l2norm, _flag(), [_tensors(torch.float32)])
    assert norm.shape == (1,) and each.numel() == 0


def test_l2norm_counts_a_tensor_as_often_as_it_is_listed() -> None:
    one = torch.tensor([3.0, 4.0])
    norm, each = multi_tensor_l2norm(1, _flag(), [[one, one]], True)
    assert norm.item() == pytest.approx(math.sqrt(50.0), rel=1e-6)
    assert each.tolist() == pytest.approx([5.0, 5.0], rel=1e-6)


def test_l2norm_of_nothing() -> None:
    norm, each = multi_tensor_l2norm(1, _flag(), [[]], True)
    assert norm.tolist() == [0.0] and each.shape == (0,)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_flag_is_raised_and_never_lowered(bad: float) -> None:
    tensors = _tensors(torch.float16, torch.float32)
    tensors[1][0, 0] = bad
    flag = _flag()
    norm, _ = multi_tensor_l2norm(1, flag, [tensors])
    assert not norm.isfinite()
    assert flag.item() == 1
    multi_tensor_l2norm(1, flag, [_tensors(torch.float32)])
    multi_tensor_scale(1, flag, [_tensors(torch.float32), _tensors(torch.float32)], 2.0)
    assert flag.item() == 1

    flag = _flag()
    multi_tensor_scale(1, flag, [tensors, tensors], 0.5)
    assert flag.item() == 1
    assert not tensors[1][0, 0].isfinite()
    assert tensors[0].isfinite().all()


def test_a_finite_list_has_a_finite_norm() -> None:
    flag = _flag()
    norm, _ = multi_tensor_l2norm(1, flag, [[torch.full((9,), 1e30)]])
    assert norm.item() == pytest.approx(3e30, rel=1e-6)
    assert flag.item() == 0


@pytest.mark.parametrize("target", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("source", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.25, 3.0, 1.0, 1e-3, 0.0])
def test_scale_from_one_type_to_another(
    source: torch.dtype, target: torch.dtype, scale: float
) -> None:
    inputs = _tensors(source)
    before = [tensor.clone() for tensor in inputs]
    outputs = [torch.full_like(tensor, 7.0).to(target) for tensor in inputs]
    flag = _flag()
    assert multi_tensor_applier(multi_tensor_scale, flag, [inputs, outputs], scale) is None
    assert flag.item() == 0
    exact = torch.tensor(scale, dtype=torch.float32).double()
    for given, old, out in zip(inputs, before, outputs, strict=True):
        assert same_bits(given, old), "an input was written"
        rtol = max(ELEMENT_RTOL[target], ELEMENT_RTOL[torch.promote_types(source, target)])
        torch.testing.assert_close(
            out.double(), old.double() * exact, rtol=rtol, atol=ELEMENT_ATOL[target]
        )


def test_scale_down_to_a_type_that_could_not_hold_the_input() -> None:
    out = torch.zeros(2, dtype=torch.float16)
    multi_tensor_scale(1, _flag(), [[torch.tensor([1e6, -2e6])], [out]], 1e-3)
    assert out.tolist() == [1000.0, -2000.0]


def test_scale_in_place_is_one_call_of_the_kernel() -> None:
    tensors = _tensors(torch.float32, torch.bfloat16)
    before = [tensor.clone() for tensor in tensors]
    with mock.patch.object(cpu, "clip_", wraps=cpu.clip_) as kernel:
        multi_tensor_scale(1, _flag(), [tensors, tensors], 0.5)
    assert kernel.call_count == 1
    for after, old in zip(tensors, before, strict=True):
        assert torch.equal(after, old * 0.5)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[torch.ones(2)]], "expected 2 lists of tensors, got 1"),
        ([[torch.ones(2)], []], "lists of the same length, got 1 and 0 tensors"),
        ([[torch.ones(2)], [torch.ones(3)]], r"same shape at 0, got \(2,\) and \(3,\)"),
    ],
    ids=["one list", "lengths", "shapes"],
)
def test_what_does_not_fit_is_refused(lists: list[list[Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_tensor_scale(1, _flag(), lists, 1.0)


def test_the_applier_is_known_as_available() -> None:
    assert multi_tensor_applier.available
    seen = multi_tensor_applier(lambda *arguments: arguments, "flag", [["a"]], 1, 2)
    assert seen == (2048 * 32, "flag", [["a"]], 1, 2)
