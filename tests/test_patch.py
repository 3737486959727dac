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
