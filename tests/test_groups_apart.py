"""Parameter groups with ``"clip": False``: neither counted nor scaled, whoever clips."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fusedclip
from tests.helpers import assert_norm, exact_norm, same_bits

Optimizer = torch.optim.Optimizer


def _with_grads(count: int = 4) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(3, 3)) for _ in range(count)]
    for i, p in enumerate(params):
        p.grad = torch.full((3, 3), float(i + 1))
    return params


def _grads(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def _check_apart(before: list[torch.Tensor], after: list[torch.Tensor], apart: list[int]) -> None:
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert same_bits(old, new) == (i in apart), i


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("limit", [1.0, fusedclip.AdaGC(), fusedclip.ZClip(warmup=1)], ids=repr)
def test_a_group_of_an_optimizer(scope: str, limit: Any) -> None:
    params = _with_grads()
    optimizer = torch.optim.SGD(
        [{"params": params[:1]}, {"params": params[1:3], "clip": False}, {"params": params[3:]}],
        lr=1.0,
    )
    before = _grads(params)
    clipper = fusedclip.Clipper(optimizer, limit, scope=scope, monitor=True)
    norms = clipper.clip_()
    exact = [exact_norm([g]) for g in before]
    if scope == "global":
        assert_norm(norms, exact_norm([before[0], before[3]]))
    elif scope == "group":
        assert norms.tolist() == pytest.approx([exact[0], 0.0, exact[3]])
    else:
        assert norms.tolist() == pytest.approx([exact[0], 0.0, 0.0, exact[3]])
    apart = [1, 2] if not isinstance(limit, fusedclip.ZClip) else [0, 1, 2, 3]
    _check_apart(before, _grads(params), apart)
    optimizer.param_groups[1]["clip"] = True  # it is asked anew at each call
    if scope != "global":
        assert clipper.clip_().numel() == norms.numel()


def test_clip_itself() -> None:
    params = _with_grads(2)
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "clip": False}])
    before = _grads(params)
    assert_norm(fusedclip.clip_(optimizer, 1.0), exact_norm(before[:1]))
    _check_apart(before, _grads(params), [1])


@pytest.mark.parametrize("value", [True, None, 0, 1.0])
def test_only_false_keeps_apart(value: Any) -> None:
    """The twin: another optimizer may have a key of this name for something else."""
    params = _with_grads(2)
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "clip": value}])
    before = _grads(params)
    assert_norm(fusedclip.clip_(optimizer, 1.0), exact_norm(before))


def test_several_optimizers_as_the_parameters() -> None:
    params = _with_grads()
    muon = torch.optim.Muon([{"params": params[:2], "clip": False}], lr=0.01)
    adamw = torch.optim.AdamW(params[2:], lr=0.01)
    before = _grads(params)
    clipper = fusedclip.Clipper([muon, adamw], 1.0, scope="group", monitor=True)
    assert clipper.clip_().tolist() == pytest.approx([0.0, exact_norm(before[2:])])
    _check_apart(before, _grads(params), [0, 1])
    with pytest.raises(TypeError, match="expected optimizers or tensors, got both"):
        fusedclip.Clipper([muon, params[0]], 1.0)


def _two(fused: bool) -> tuple[nn.Module, Optimizer, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=0.02)
    return model, muon, torch.optim.AdamW(others, lr=0.02, fused=fused)


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return 5 * model(x).square().sum()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", ["muon", "adamw"])
def test_attached_to_several_optimizers(apart: bool, fused: bool, first: str) -> None:
    """Clipped once a step, by hand or by whichever steps first; nobody warns."""
    results = []
    for attached in (False, True):
        model, muon, adamw = _two(fused)
        if apart:
            muon.param_groups[0]["clip"] = False
        optimizers = [muon, adamw] if first == "muon" else [adamw, muon]
        clipper = fusedclip.Clipper(model, 0.5)
        norms = []
        if attached:
            for optimizer in optimizers:
                clipper.attach(optimizer)
        for step in range(5):
            _loss(model, step).backward()
            if not attached:
                counted = [
                    p
                    for o in ([adamw] if apart else optimizers)
                    for p in o.param_groups[0]["params"]
                ]
                norms.append(fusedclip.clip_(counted, 0.5))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for optimizer in optimizers:
                    optimizer.step()
            if attached:
                norms.append(clipper.last_norm)
            model.zero_grad(set_to_none=step % 2 == 0)
        results.append((model, norms))
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=0)
    for p, q in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_fused_optimizer_beside_one_that_is_kept_apart_is_one_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, muon, adamw = _two(fused=True)
    muon.param_groups[0]["clip"] = False
    clipper = fusedclip.Clipper(model, 0.5)
    clipper.attach(muon)
    clipper.attach(adamw)
    monkeypatch.setattr(
        "fusedclip.backends.cpu.scale_", lambda *a, **k: pytest.fail("scaled in place")
    )
    _loss(model, 0).backward()
    muon.step()
    adamw.step()
    assert clipper.last_norm is not None


@pytest.mark.parametrize("first", ["muon", "adamw"])
def test_a_step_is_left_out_by_all_of_them(first: str) -> None:
    model, muon, adamw = _two(fused=True)
    muon.param_groups[0]["clip"] = False
    clipper = fusedclip.Clipper(model, 1e9, skip_above=1e4)
    clipper.attach(muon, allow_sync=True)
    clipper.attach(adamw)
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        (_loss(model, step) * (1e6 if step == 2 else 1.0)).backward()
        for optimizer in (muon, adamw) if first == "muon" else (adamw, muon):
            optimizer.step()
        model.zero_grad()
        kept = [same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(kept) if step == 2 else not any(kept)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["scaler", "unscale_and_clip_", "attached"])
@pytest.mark.parametrize("bad", [False, True])
def test_under_a_loss_scale_all_are_unscaled(fused: bool, how: str, bad: bool) -> None:
    """And an overflow in the group that is kept apart is an overflow."""

    def run(scaled: bool) -> tuple[list[torch.Tensor], float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        groups = [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "clip": False},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.01, fused=fused)
        _loss(model, 0).backward() if not scaled else None
        if not scaled:
            if not bad:
                fusedclip.clip_(optimizer, 0.5)
                optimizer.step()
            return [p.detach() for p in model.parameters()], 0.0
        options = {"init_scale": 2.0**8}
        if how == "scaler":
            scaler: Any = fusedclip.amp.GradScaler("cpu", max_norm=0.5, **options)
        else:
            scaler = torch.amp.GradScaler("cpu", **options)
        if how == "attached":
            fusedclip.Clipper(model, 0.5).attach(optimizer)
        scaler.scale(_loss(model, 0)).backward()
        if bad:
            model[2].weight.grad[0, 0] = torch.inf
        if how == "unscale_and_clip_":
            fusedclip.amp.unscale_and_clip_(scaler, optimizer, 0.5)
        scaler.step(optimizer)
        scaler.update()
        return [p.detach() for p in model.parameters()], scaler.get_scale()

    expected, _ = run(False)
    actual, scale = run(True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert scale == 2.0**8 * (0.5 if bad else 1.0)
