"""Megatron-core on two ranks; the cases are in ``megatron_cases``."""

import importlib
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

from fusedclip.integrations import apex
from fusedclip.integrations import megatron as integration
from tests.distributed.processes import failures, run_job
from tests.integrations import megatron_cases
from tests.integrations.megatron_cases import pretended_cuda
from tests.integrations.record import verifies

_TRAINED = {"pipeline_stages": "`FP32Optimizer`, 2 pipeline stages, on the CPU in place of CUDA"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run_job("tests.integrations.megatron_cases", 2)


def _case(name: str) -> Any:
    what = _TRAINED.get(name)
    mark = [] if what is None else [verifies("Megatron-core", "megatron-core", what=what)]
    return pytest.param(name, marks=mark, id=name)


@pytest.mark.parametrize("name", [_case(name) for name in megatron_cases.CASES[2]])
def test_case(outcomes: dict[str, list[str]], name: str) -> None:
    problem = failures(outcomes.get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)


def _functions() -> dict[str, Any]:
    now = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Megatron falls back to without CUDA extensions
        for name in megatron_cases.UNTOUCHED:
            module, _, function = name.partition(":")
            now[name] = getattr(importlib.import_module(module), function)
    return now


def test_patch_is_undone_exactly() -> None:
    before = _functions()
    with integration.patch():
        integration.patch()
        assert all(now is not before[name] for name, now in _functions().items())
    integration.unpatch()
    integration.unpatch()
    assert _functions() == before


def test_unknown_internals_are_left_alone() -> None:
    from megatron.core.optimizer import clip_grads

    before = _functions()
    with mock.patch.object(clip_grads, "get_grad_norm_fp32", lambda grads, norm_type=2: 0.0):
        with pytest.warns(UserWarning, match="get_grad_norm_fp32 .takes .grads, norm_type."):
            integration.patch()
        assert _functions()[megatron_cases.UNTOUCHED[1]] is before[megatron_cases.UNTOUCHED[1]]
        integration.unpatch()
    assert _functions() == before


@pytest.mark.parametrize("scale", [0.3, 1.0])
@verifies("apex's signatures", "megatron-core", what="against Megatron-core's own stand-ins")
def test_apex_functions_agree_with_megatrons_stand_ins(scale: float) -> None:
    """Megatron has functions of its own for where apex is not installed, with its signatures."""
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )

    torch.manual_seed(0)
    tensors = [torch.randn(70_001), torch.randn(3, 5)]
    flag = torch.zeros(1, dtype=torch.int)
    with pretended_cuda():
        theirs, _ = local_multi_tensor_applier(local_multi_tensor_l2_norm, flag, [tensors], False)
        ours, _ = apex.multi_tensor_applier(apex.multi_tensor_l2norm, flag, [tensors], False)
    torch.testing.assert_close(ours, theirs)
    expected = [torch.empty_like(tensor) for tensor in tensors]
    actual = [torch.empty_like(tensor) for tensor in tensors]
    local_multi_tensor_applier(local_multi_tensor_scale, flag, [tensors, expected], scale)
    apex.multi_tensor_applier(apex.multi_tensor_scale, flag, [tensors, actual], scale)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
