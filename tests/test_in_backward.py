"""Clipping during backward: each gradient as it lands, before what was registered later."""

import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from tests.helpers import assert_scaled, exact_coefficient, same_bits


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def _loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return model(x).square().sum()


def _limits() -> list[Any]:
    return [
        2.0,
        torch.tensor(2.0, dtype=torch.float64),
        fusedclip.AutoClip(50, window=8),
        fusedclip.ZClip(warmup=3),
        fusedclip.AdaGC(absolute=1e9, warmup=3),
    ]


@pytest.mark.parametrize("which", range(5), ids=["number", "tensor", "AutoClip", "ZClip", "AdaGC"])
def test_the_same_as_after_backward(which: int) -> None:
    """Gradients, norms and the monitor, step by step."""
    kept = []
    for during in (False, True):
        model = _model()
        clipper = fusedclip.Clipper(model, _limits()[which], scope="parameter", monitor=True)
        if during:
            clipper.attach_to_backward()
        steps = []
        for step in range(10):
            (_loss(model, step) * (30 if step == 7 else 1)).backward()
            if not during:
                clipper.clip_()
            assert clipper.last_norm is not None
            steps.append([clipper.last_norm, *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
        assert clipper.monitor is not None
        kept.append((steps, clipper.monitor.state_dict(), clipper.state_dict()["max_norm"]))
    torch.testing.assert_close(kept[1][0], kept[0][0], rtol=1e-6, atol=1e-9)
    for name in ("norms", "thresholds", "tensor_norms", "segment_norms", "segment_thresholds"):
        torch.testing.assert_close(kept[1][1][name], kept[0][1][name], rtol=1e-6, atol=0)
    assert kept[1][1]["names"] == kept[0][1]["names"] == kept[1][1]["segments"]
    if which > 1:  # the policy's memory is one, whoever asks it
        torch.testing.assert_close(kept[1][2], kept[0][2], rtol=1e-6, atol=0)


def test_the_comparison_can_fail() -> None:
    """The twin: without it the gradients are as they landed."""
    model, other = _model(), _model()
    fusedclip.Clipper(model, 2.0, scope="parameter").attach_to_backward()
    _loss(model, 0).backward()
    _loss(other, 0).backward()
    assert not all(
        same_bits(p.grad, q.grad)
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("first", [False, True], ids=["registered before", "registered after"])
def test_later_hooks_see_the_clipped_gradient(first: bool) -> None:
    seen: list[float] = []
    p = nn.Parameter(torch.zeros(4))
    hook = lambda q: seen.append(q.grad.norm().item())  # noqa: E731
    if first:
        p.register_post_accumulate_grad_hook(hook)
    fusedclip.Clipper([p], 1.0, scope="parameter").attach_to_backward()
    if not first:
        p.register_post_accumulate_grad_hook(hook)
    (p * 5.0).sum().backward()
    assert seen == pytest.approx([10.0 if first else 1.0], rel=1e-5)


def test_an_optimizer_in_the_backward_pass() -> None:
    """As torchtune does: each parameter has an optimizer that steps as its gradient lands."""
    kept = []
    for during in (False, True):
        model = _model()
        clipper = fusedclip.Clipper(model, 2.0, scope="parameter")
        if during:
            clipper.attach_to_backward()
        optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in model.parameters()}

        def step(p: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        if during:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(step)
        for number in range(5):
            _loss(model, number).backward()
            if not during:
                clipper.clip_()
                for p in model.parameters():
                    step(p)
            assert all(p.grad is None for p in model.parameters())
        kept.append(model)
    for p, q in zip(kept[0].parameters(), kept[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_accumulation() -> None:
    model, whole = _model(), _model()
    clipper = fusedclip.Clipper(model, 2.0, scope="parameter", monitor=True)
    handle = clipper.attach_to_backward()
    with handle.accumulating():
        for step in range(3):
            _loss(model, step).backward()
    assert clipper.last_norm is None
    _loss(model, 3).backward()
    for step in range(4):
        _loss(whole, step).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert_scaled(p.grad, q.grad, exact_coefficient(q.grad.double().norm().item(), 2.0))
    assert clipper.monitor is not None and clipper.monitor.summary().steps == 1


def test_a_weight_that_is_used_twice_is_clipped_once() -> None:
    p = nn.Parameter(torch.ones(4))
    clipper = fusedclip.Clipper([p, p], 1.0, scope="parameter")
    clipper.attach_to_backward()
    (p * 3.0).sum().add((p * 2.0).sum()).backward()
    assert clipper.last_norm is not None and clipper.last_norm[0] == 10.0
    torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))


def test_groups_kept_apart_and_parameters_without_gradients() -> None:
    model = _model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "clip": False}]
    )
    clipper = fusedclip.Clipper(optimizer, 0.1, scope="parameter")
    clipper.attach_to_backward()
    _loss(model, 0).backward()
    norms = [p.grad.norm().item() for p in model.parameters()]
    assert norms[:2] == pytest.approx([0.1, 0.1], rel=1e-4)
    assert min(norms[2:]) > 0.2
    assert clipper.last_norm is not None and clipper.last_norm[2:].tolist() == [0.0, 0.0]
    optimizer.param_groups[1]["clip"] = True
    model.zero_grad()
    _loss(model, 0).backward()
    assert model[2].weight.grad.norm() < 0.11


def test_a_loaded_state_is_the_one_that_decides() -> None:
    model = _model()
    clipper = fusedclip.Clipper(model, fusedclip.AdaGC(absolute=1e9, warmup=2), scope="parameter")
    handle = clipper.attach_to_backward()
    for step in range(4):
        _loss(model, step).backward()
        model.zero_grad()
    state = clipper.state_dict()
    results = []
    for _ in range(2):
        clipper.load_state_dict(state)
        _loss(model, 9).backward()
        results.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    other = fusedclip.Clipper(model, fusedclip.AdaGC(absolute=1e9, warmup=2), scope="parameter")
    other.load_state_dict(state)  # by hand after backward: the same memory
    handle.remove()
    _loss(model, 9).backward()
    other.clip_()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], results[0], rtol=1e-6, atol=1e-9
    )


def _attached(model: nn.Module) -> nn.Module:
    model.zero_grad()
    fusedclip.Clipper(model, 1e-3, scope="parameter").attach_to_backward()
    return model


def test_remove_and_letting_go() -> None:
    model = _model()
    handle = fusedclip.Clipper(model, 1e-3, scope="parameter").attach_to_backward()
    gc.collect()
    _loss(model, 0).backward()  # nobody kept the Clipper, and it clips
    assert all(p.grad.norm() < 2e-3 for p in model.parameters())
    handle.remove()
    handle.remove()
    model.zero_grad()
    _loss(model, 0).backward()
    assert any(p.grad.norm() > 1.0 for p in model.parameters())
    copied = pickle.loads(pickle.dumps(_attached(model)))
    _loss(copied, 0).backward()
    assert any(p.grad.norm() > 1.0 for p in copied.parameters())  # a copy does not clip
    other = _model()
    fusedclip.Clipper(other, 1.0, scope="parameter").attach_to_backward()
    known = weakref.ref(other[0].weight)
    del other
    gc.collect()
    assert known() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r'scope: expected "parameter", got \'global\'; .*AdaGC\(\), or attach\(optimizer\)'),
        ({"scope": "parameter", "skip_above": 1.0}, "skip_above: .*call attach"),
        ({"scope": "parameter", "nonfinite": "skip"}, "skip_above: .*call attach"),
    ],
    ids=str,
)
def test_what_cannot_be_done_says_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedclip.Clipper(_model(), 1.0, **options).attach_to_backward()


def test_other_refusals() -> None:
    clipper = fusedclip.Clipper(_model(), 1.0, scope="parameter")
    clipper.attach_to_backward()
    with pytest.raises(ValueError, match=r"attached to their backward already; remove\(\)"):
        clipper.attach_to_backward()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="none of them requires a gradient"):
        fusedclip.Clipper(frozen, 1.0, scope="parameter").attach_to_backward()


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "error"])
def test_gradients_that_are_not_finite(nonfinite: str) -> None:
    good, bad = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    clipper = fusedclip.Clipper([good, bad], 1.0, scope="parameter", nonfinite=nonfinite)
    clipper.attach_to_backward()
    loss = (good * 5.0).sum() + (bad * math.nan).sum()
    if nonfinite == "error":
        with pytest.raises(fusedclip.NonfiniteGradientError):
            loss.backward()
        return
    loss.backward()
    torch.testing.assert_close(good.grad.norm(), torch.tensor(1.0))
    assert bad.grad.isnan().all() if nonfinite == "propagate" else (bad.grad == 0).all()
