"""``patch``: every name torch has, exact undo, nesting, and modules that imported by name."""

import contextlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch.nn.utils import clip_grad

import fusedclip
from tests.helpers import parameters

NAMES = [
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.nn.utils, "get_total_norm"),
    (torch.nn.utils, "clip_grads_with_norm_"),
    (torch.nn.utils, "clip_grad_value_"),
    (clip_grad, "clip_grad_norm_"),
    (clip_grad, "clip_grad_value_"),
]
ORIGINALS = [getattr(module, name) for module, name in NAMES]


def _current() -> list[object]:
    return [getattr(module, name) for module, name in NAMES]


@pytest.fixture
def framework() -> Iterator[types.ModuleType]:
    """A module that took torch's function by name before the patch."""
    module = types.ModuleType("some_framework")
    module.clip = ORIGINALS[0]
    sys.modules["some_framework"] = module
    yield module
    del sys.modules["some_framework"]


@pytest.mark.filterwarnings("ignore:fusedclip.patch")
def test_patch_and_unpatch_are_exact_and_idempotent() -> None:
    fusedclip.patch()
    fusedclip.patch()
    patched = _current()
    assert all(new.__module__ == "fusedclip.functional" for new in patched)
    fusedclip.unpatch()
    assert _current() == ORIGINALS
    fusedclip.unpatch()
    assert _current() == ORIGINALS


@pytest.mark.filterwarnings("ignore:fusedclip.patch")
def test_nested_contexts() -> None:
    with fusedclip.patch():
        with fusedclip.patch():
            pass
        assert torch.nn.utils.clip_grad_norm_ is fusedclip.clip_grad_norm_
    assert _current() == ORIGINALS
    fusedclip.patch()
    with pytest.raises(KeyError), fusedclip.patch():
        raise KeyError
    assert torch.nn.utils.clip_grad_norm_ is fusedclip.clip_grad_norm_


@pytest.mark.filterwarnings("ignore:fusedclip.patch")
def test_patched_functions_clip() -> None:
    params = parameters(torch.tensor([30.0, 40.0]).bfloat16())
    with fusedclip.patch():
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        torch.nn.utils.clip_grad_value_(params, 0.5)
        with pytest.warns(FutureWarning):
            torch.nn.utils.clip_grad_norm(params, 1.0)
    assert norm.dtype == torch.float32  # torch's would be bfloat16
    assert params[0].grad.abs().max() <= 0.5


def test_stale_references_are_reported(framework: types.ModuleType) -> None:
    with pytest.warns(UserWarning, match=r"some_framework\.clip.*rebind=True"):
        patched = fusedclip.patch()
    assert "some_framework.clip" in patched.stale
    assert framework.clip is ORIGINALS[0]
    assert not any(name.startswith("torch.") for name in patched.stale)


def test_torchs_functions_stay_whole(framework: types.ModuleType) -> None:
    """Whoever imported one by name gets torch's result, of torch's type."""
    for rebind in (False, True):
        params = parameters(torch.tensor([30.0, 40.0]).bfloat16())
        with pytest.warns(UserWarning) if not rebind else contextlib.nullcontext():
            patched = fusedclip.patch(rebind=rebind)
        with patched:
            assert ORIGINALS[0](params, 1.0).dtype == torch.bfloat16
        fusedclip.unpatch()


def test_rebind_takes_them_along_and_back(framework: types.ModuleType) -> None:
    with fusedclip.patch(rebind=True) as patched:
        assert patched.stale == []
        assert framework.clip is fusedclip.clip_grad_norm_
    assert framework.clip is ORIGINALS[0]


@pytest.mark.filterwarnings("ignore:fusedclip.patch")
def test_rebind_after_a_plain_patch(framework: types.ModuleType) -> None:
    fusedclip.patch()
    fusedclip.patch(rebind=True)
    assert framework.clip is fusedclip.clip_grad_norm_
    fusedclip.unpatch()
    assert framework.clip is ORIGINALS[0]
    assert _current() == ORIGINALS


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "skip_above", [100.0, fusedclip.SkipSpikes(6.0, 8)], ids=["number", "policy"]
)
def test_steps_are_left_out_behind_torchs_names(fused: bool, skip_above: object) -> None:
    """The training clips by torch's name and steps by itself."""
    if skip_above == "policy":
        skip_above = fusedclip.SkipSpikes(6.0, 8)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    with fusedclip.patch(skip_above=skip_above):
        for step in range(9):
            x = torch.ones(1, 3) + 0.01 * step
            (model(x).sum() * (1e5 if step == 7 else 1.0)).backward()
            before = model.weight.detach().clone()
            grad = model.weight.grad
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            assert model.weight.grad is grad and "found_inf" not in vars(optimizer)
            optimizer.zero_grad()
            if step != 8:  # to the policy the next one is in question as well
                assert torch.equal(before, model.weight) == (step == 7)
    (model(torch.ones(1, 3)).sum() * 1e5).backward()
    before = model.weight.detach().clone()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(before, model.weight)  # the twin: undone


def test_another_skip_above_is_refused() -> None:
    with fusedclip.patch(skip_above=2.0):
        fusedclip.patch()  # leaves it
        with pytest.raises(ValueError, match=r"patched with skip_above=2\.0, got 3\.0"):
            fusedclip.patch(skip_above=3.0)
    with pytest.raises(ValueError, match="skip_above: expected a threshold >= 0"):
        fusedclip.patch(skip_above=-1.0)
