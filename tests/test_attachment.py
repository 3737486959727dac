"""Clipping inside optimizer.step(): the steps of torch's clip and step, nothing left behind."""

import copy
import gc
import math
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import call

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
FUSED = [name for name in OPTIMIZERS if "fused" in name]


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(16, 6, generator=generator)).square().sum() * (
        1 + 20 * (step % 3 == 0)
    )


def _with_torch(make: MakeOptimizer, max_norm: float, steps: int = 8) -> tuple[nn.Module, list]:
    model = _model()
    optimizer = make(list(model.parameters()))
    norms = []
    for step in range(steps):
        _loss(model, step).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def _assert_same(model: nn.Module, other: nn.Module) -> None:
    """As close as the clips are: a coefficient that differs by an ulp or two in every step."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [5.0, 1e9], ids=["clipped", "not clipped"])
def test_the_same_steps_as_clip_and_step(name: str, max_norm: float) -> None:
    expected, norms = _with_torch(OPTIMIZERS[name], max_norm)
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    clipper = fusedclip.Clipper(model, max_norm)
    clipper.attach(optimizer)
    for step in range(8):
        _loss(model, step).backward()
        optimizer.step()
        torch.testing.assert_close(clipper.last_norm, norms[step], rtol=1e-4, atol=0)
        assert "grad_scale" not in vars(optimizer) and "found_inf" not in vars(optimizer)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    _assert_same(model, expected)


def test_the_comparison_can_fail() -> None:
    """The twin: without clipping the same steps lead elsewhere."""
    with pytest.raises(AssertionError):
        _assert_same(_with_torch(OPTIMIZERS["SGD"], 5.0)[0], _with_torch(OPTIMIZERS["SGD"], 1e9)[0])


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimizer_is_handed_the_coefficient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read: no backend scales anything."""
    monkeypatch.setattr(
        "fusedclip.backends.cpu.scale_", lambda *a, **k: pytest.fail("scaled in place")
    )
    monkeypatch.setattr(
        "fusedclip.backends.cpu.clip_", lambda *a, **k: pytest.fail("clipped in place")
    )
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    fusedclip.Clipper(model, 0.5).attach(optimizer)
    _loss(model, 0).backward()
    optimizer.step()


@pytest.mark.parametrize("name", FUSED)
def test_under_amp_a_fused_optimizer_needs_nothing_else(name: str) -> None:
    """scale, step, update: the same as torch's unscale_, clip and step; overflow is skipped."""
    results = []
    for attached in (False, True):
        model = _model()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        if attached:
            fusedclip.Clipper(model, 5.0).attach(optimizer)
        scales = []
        for step in range(8):
            loss = _loss(model, step) * (math.inf if step == 4 else 1.0)
            scaler.scale(loss).backward()
            if not attached:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            assert "grad_scale" not in vars(optimizer) and "found_inf" not in vars(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            optimizer.zero_grad()
        results.append((model, scales))
    assert results[0][1] == results[1][1]
    assert results[0][1][4] < results[0][1][3]  # the overflow was seen
    _assert_same(results[1][0], results[0][0])


def test_under_amp_other_optimizers_get_unscaled_gradients() -> None:
    """torch's scaler unscales before it calls step(), so the norm is the true one."""
    model = _model()
    optimizer = OPTIMIZERS["SGD"](list(model.parameters()))
    clipper = fusedclip.Clipper(model, 5.0)
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(_loss(model, 0)).backward()
    scaler.step(optimizer)
    expected, norms = _with_torch(OPTIMIZERS["SGD"], 5.0, steps=1)
    torch.testing.assert_close(clipper.last_norm, norms[0])
    _assert_same(model, expected)


@pytest.mark.parametrize("options", [{"nonfinite": "zero"}, {"scope": "parameter"}], ids=str)
def test_scaled_gradients_are_clipped_in_place_by_their_true_norm(options: dict[str, str]) -> None:
    """A fused optimizer divides by the loss scale afterwards, as ever."""
    results = []
    for scaled in (False, True):
        model = _model()
        optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
        clipper = fusedclip.Clipper(model, 5.0, **options)
        clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        norms = []
        for step in range(4):
            scaler.scale(_loss(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
            norms.append(clipper.last_norm)
            optimizer.zero_grad()
        results.append((model, norms))
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=0)
    _assert_same(results[1][0], results[0][0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_changes_neither_parameters_nor_state(name: str) -> None:
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    clipper = fusedclip.Clipper(model, 5.0, nonfinite="skip")
    clipper.attach(optimizer, allow_sync="fused" not in name)
    for step in range(2):
        _loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    (_loss(model, 2) * math.nan).backward()
    bad = [p.grad for p in model.parameters()]
    optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert clipper.last_norm is not None
    assert [p.grad for p in model.parameters()] == bad  # the same tensors are there again
    optimizer.zero_grad()
    _loss(model, 3).backward()
    optimizer.step()  # and training goes on
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)


def test_skip_is_refused_where_it_would_wait() -> None:
    model = _model()
    clipper = fusedclip.Clipper(model, 5.0, nonfinite="skip")
    with pytest.raises(ValueError, match=r"SGD cannot leave out .*fused=False; .*allow_sync=True"):
        clipper.attach(OPTIMIZERS["SGD"](list(model.parameters())))


def test_error_raises_before_the_step_and_leaves_everything() -> None:
    for name in ("AdamW", "AdamW fused"):
        model = _model()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        fusedclip.Clipper(model, 5.0, nonfinite="error").attach(optimizer)
        before = copy.deepcopy(model.state_dict())
        (_loss(model, 0) * math.inf).backward()
        with pytest.raises(fusedclip.NonfiniteGradientError, match=r"0\.weight"):
            optimizer.step()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert "grad_scale" not in vars(optimizer)


def test_nothing_stays_when_the_step_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
    fusedclip.Clipper(model, 5.0).attach(optimizer)
    _loss(model, 0).backward()
    seen = []

    def fails(*arguments: object, **options: object) -> None:
        seen.append(vars(optimizer).get("grad_scale"))
        raise RuntimeError("out of luck")

    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    assert isinstance(seen[0], Tensor)
    assert "grad_scale" not in vars(optimizer) and "found_inf" not in vars(optimizer)


@pytest.mark.parametrize("name", ["SGD", "AdamW fused", "LBFGS"])
@pytest.mark.parametrize("keyword", [False, True])
def test_closures_are_clipped_after_each_evaluation(name: str, keyword: bool) -> None:
    makers = {**OPTIMIZERS, "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)}
    results = []
    for attached in (False, True):
        model = _model()
        optimizer = makers[name](list(model.parameters()))
        if attached:
            fusedclip.Clipper(model, 5.0).attach(optimizer)
        for step in range(3):

            def closure(step: int = step, model: nn.Module = model, own: bool = attached) -> Tensor:
                model.zero_grad()
                loss = _loss(model, step)
                loss.backward()
                if not own:  # ours: L-BFGS makes a hundredth out of the last bit of a coefficient
                    fusedclip.clip_(model, 5.0)
                return loss

            value = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert value is not None
        results.append(model)
    _assert_same(results[1], results[0])


def test_accumulation_clips_once_a_step() -> None:
    model = _model()
    optimizer = OPTIMIZERS["SGD"](list(model.parameters()))
    clipper = fusedclip.Clipper(model, 5.0)
    clipper.attach(optimizer)
    for micro in range(3):
        (_loss(model, micro) / 3).backward()
    exact = fusedclip.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    assert torch.equal(clipper.last_norm, exact)


def test_parameters_frozen_and_added_later() -> None:
    model = _model()
    optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
    clipper = fusedclip.Clipper(model, 5.0)
    clipper.attach(optimizer)
    model[0].weight.requires_grad_(False)
    extra = nn.Linear(3, 3)
    model.append(extra)
    optimizer.add_param_group({"params": extra.parameters()})
    _loss(model, 0).backward()
    exact = fusedclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    before = model[0].weight.clone()
    optimizer.step()
    torch.testing.assert_close(clipper.last_norm, exact)
    assert torch.equal(model[0].weight, before)


def test_an_optimizer_of_other_parameters_too_is_not_handed_the_coefficient() -> None:
    """It would scale the others' gradients as well: those of the Clipper are clipped in place."""
    model, other = _model(), nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=1.0, fused=True)
    fusedclip.Clipper(model, 1e-3).attach(optimizer)
    _loss(model, 0).backward()
    other.grad = torch.full((4,), 0.25)
    optimizer.step()
    torch.testing.assert_close(other.detach(), torch.full((4,), 0.75))


def test_scopes_are_clipped_in_place() -> None:
    model = _model()
    groups = [{"params": [p], "max_norm": 0.1 * i} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    clipper = fusedclip.Clipper(optimizer, 1.0, scope="group")
    clipper.attach(optimizer)
    _loss(model, 0).backward()
    optimizer.step()
    for i, p in enumerate(model.parameters()):
        assert p.grad.norm().item() == pytest.approx(0.1 * i, rel=1e-3, abs=1e-6)


def test_remove_undoes_everything() -> None:
    model = _model()
    optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
    hooks, listeners = len(optimizer._optimizer_step_pre_hooks), set(call.listeners)
    attachment = fusedclip.Clipper(model, 5.0).attach(optimizer)
    assert "step" in vars(optimizer)
    attachment.remove()
    attachment.remove()
    assert "step" not in vars(optimizer)
    assert (len(optimizer._optimizer_step_pre_hooks), set(call.listeners)) == (hooks, listeners)
    _loss(model, 0).backward()
    norm = fusedclip.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    assert torch.equal(fusedclip.get_total_norm([p.grad for p in model.parameters()]), norm)
    fusedclip.Clipper(model, 5.0).attach(optimizer)  # there is room for another one


def test_attaching_twice_is_refused() -> None:
    model = _model()
    optimizer = OPTIMIZERS["SGD"](list(model.parameters()))
    fusedclip.Clipper(model, 5.0).attach(optimizer)
    with pytest.raises(ValueError, match="attached to it already; remove"):
        fusedclip.Clipper(model, 1.0).attach(optimizer)


def test_an_optimizer_without_the_parameters_is_refused() -> None:
    model, elsewhere = _model(), _model()
    clipper = fusedclip.Clipper(model, 5.0)
    with pytest.raises(ValueError, match="none of the Clipper's parameters"):
        clipper.attach(OPTIMIZERS["SGD"](list(elsewhere.parameters())))
    optimizer = OPTIMIZERS["SGD"](list(model.parameters()))
    clipper.attach(optimizer)
    optimizer.param_groups[0]["params"] = list(elsewhere.parameters())
    _loss(elsewhere, 0).backward()
    with pytest.raises(ValueError, match="none of the Clipper's parameters"):
        optimizer.step()


@pytest.mark.parametrize("who", ["clip_", "drop-in", "patched", "by hand"])
def test_nothing_is_clipped_twice(who: str) -> None:
    model = _model()
    optimizer = OPTIMIZERS["SGD"](list(model.parameters()))
    clipper = fusedclip.Clipper(model, 5.0)
    clipper.attach(optimizer)
    clips = {
        "clip_": lambda: fusedclip.clip_(model, 50.0),
        "drop-in": lambda: fusedclip.clip_grad_norm_(model.parameters(), 50.0),
        "patched": lambda: nn.utils.clip_grad_norm_(model.parameters(), 50.0),
        "by hand": clipper.clip_,
    }
    with fusedclip.patch():
        _loss(model, 0).backward()
        clips[who]()
        after = [p.grad.clone() for p in model.parameters()]
        with pytest.warns(UserWarning, match="left them alone; take away one of the two"):
            optimizer.step()
        assert all(torch.equal(p.grad, a) for p, a in zip(model.parameters(), after, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            clips[who]()
            optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("own_scaler", [False, True])
def test_a_scaler_that_clips_is_noticed(name: str, own_scaler: bool) -> None:
    results = []
    for attached in (False, True):
        model = _model()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        if attached:
            fusedclip.Clipper(model, 0.01).attach(optimizer)
        if own_scaler:
            scaler = fusedclip.amp.GradScaler("cpu", init_scale=2.0**10, max_norm=5.0)
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(_loss(model, 0)).backward()
        if not own_scaler:
            fusedclip.amp.unscale_and_clip_(scaler, optimizer, 5.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.step(optimizer)
        assert [w for w in caught if "take away one" in str(w.message)] != [] or not attached
        results.append(model)
    for p, q in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_look_at_the_norm_is_no_clip() -> None:
    model = _model()
    optimizer = OPTIMIZERS["SGD"](list(model.parameters()))
    clipper = fusedclip.Clipper(model, 5.0)
    clipper.attach(optimizer)
    _loss(model, 0).backward()
    norm = fusedclip.clip_(model, math.inf)
    fusedclip.clip_(nn.Linear(2, 2), 1.0)  # nor is somebody else's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(clipper.last_norm, norm)


def test_learning_rate_schedulers_before_and_after() -> None:
    for first in (True, False):
        model = _model()
        optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if first:
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            fusedclip.Clipper(model, 5.0).attach(optimizer)
            if not first:
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            for step in range(2):
                _loss(model, step).backward()
                optimizer.step()
                scheduler.step()
        assert "grad_scale" not in vars(optimizer)


@pytest.mark.parametrize("own_parameters", [False, True])
def test_a_finished_optimizer_is_let_go(own_parameters: bool) -> None:
    model = _model()
    optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
    fusedclip.Clipper(optimizer if own_parameters else model, 5.0).attach(optimizer)
    known = weakref.ref(optimizer)
    gc.collect()  # those of other tests
    count = len(call.listeners)
    del optimizer
    gc.collect()
    assert known() is None
    assert len(call.listeners) == count - 1


def test_a_policy_through_a_fused_optimizer() -> None:
    class Fixed:
        def __init__(self) -> None:
            self.seen: list[float] = []

        def threshold(self, norm: Tensor) -> Tensor:
            self.seen.append(norm.item())
            return torch.tensor(5.0, dtype=torch.float64)

        def state_dict(self) -> dict[str, object]:
            return {}

        def load_state_dict(self, state: dict[str, object]) -> None:
            pass

    expected, norms = _with_torch(OPTIMIZERS["AdamW fused"], 5.0)
    model, policy = _model(), Fixed()
    optimizer = OPTIMIZERS["AdamW fused"](list(model.parameters()))
    fusedclip.Clipper(model, policy).attach(optimizer)
    for step in range(8):
        _loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert policy.seen == pytest.approx([n.item() for n in norms], rel=1e-4)
    _assert_same(model, expected)


def test_scaling_by_a_known_norm_is_a_clip_that_is_noticed() -> None:
    """``clip_grads_with_norm_`` before ``optimizer.step()`` was followed by a second clip."""
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 100.0)
    optimizer = torch.optim.SGD([p], lr=1.0)
    clipper = fusedclip.Clipper([p], 1.0)
    clipper.attach(optimizer)
    fusedclip.clip_grads_with_norm_([p], 50.0, torch.tensor(200.0))
    with pytest.warns(UserWarning, match="clipped before"):
        optimizer.step()
    assert clipper.last_norm is None
    torch.testing.assert_close(p.grad, torch.full((4,), 25.0))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_of_the_optimizer_says_that_it_does_not_clip(copied: Callable[..., Any]) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = fusedclip.Clipper(model, 0.5).attach(optimizer)
    with pytest.warns(UserWarning, match="a copy of this optimizer does not clip"):
        other = copied(optimizer)
    assert not any(name.startswith("_fusedclip") for name in vars(other))
    fusedclip.Clipper(other.param_groups[0]["params"], 0.5).attach(other)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied(optimizer)
