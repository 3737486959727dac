"""Decisions as data: every policy at every scope, against plain transcriptions of its rule."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import AdaGC, AutoClip, SkipSpikes, ZClip
from fusedclip.policies import Policy
from tests.helpers import same_bits

STEPS, ROWS = 500, 5


def norms_by_segment(seed: int = 0) -> np.ndarray:
    """[STEPS, ROWS] with spikes, NaN, infinities and segments without gradients."""
    rng = np.random.default_rng(seed)
    norms = (1 + 3 * np.exp(-np.arange(STEPS) / 50))[:, None] * rng.lognormal(
        0.0, 0.2, (STEPS, ROWS)
    )
    norms *= 10.0 ** np.arange(-2, ROWS - 2)
    for share, value in ((30, None), (12, np.nan), (12, np.inf), (12, 0.0)):
        places = rng.choice(norms.size, share, replace=False)
        norms.reshape(-1)[places] = norms.reshape(-1)[places] * 20 if value is None else value
    norms[0] = [np.nan, np.inf, 0.0, 1.0, 5.0]
    norms[:140, 4] = 0.0  # nothing in the whole warm-up
    return norms.astype(np.float32).astype(np.float64)


def whole(row: np.ndarray) -> float:
    return float(np.sqrt(np.sum(row**2)))


class AdaGCByThePaper:
    """arXiv 2502.11034; a norm that is 0 or not finite leaves the mean alone."""

    def __init__(self, relative: float, absolute: float, beta: float, warmup: int) -> None:
        self.relative, self.absolute, self.beta, self.warmup = relative, absolute, beta, warmup
        self.gamma = [math.inf] * ROWS
        self.step = 0

    def __call__(self, norms: np.ndarray) -> tuple[list[float], bool]:
        self.step += 1
        total = whole(norms)
        factors = []
        for i, norm in enumerate(norms.tolist()):
            usable = math.isfinite(norm) and norm > 0
            if self.step <= self.warmup:
                h = min(self.absolute / total, 1.0) if total == total else math.nan
                if usable and math.isfinite(total):
                    self.gamma[i] = min(self.gamma[i], h * norm)
            elif math.isnan(norm):
                h = math.nan
            else:
                limit = self.relative * self.gamma[i]
                h = 1.0 if norm <= limit else (limit + 1e-6) / (norm + 1e-6)
                if usable and math.isinf(self.gamma[i]):
                    self.gamma[i] = norm
                elif usable:
                    clipped = min(norm, limit)
                    self.gamma[i] = self.beta * self.gamma[i] + (1 - self.beta) * clipped
            factors.append(h)
        return factors, False


class SkipSpikesByOlmo:
    def __init__(self, deviations: float, window: int) -> None:
        self.deviations, self.window = deviations, window
        self.seen: list[float] = []

    def __call__(self, norms: np.ndarray) -> tuple[list[float], bool]:
        total = whole(norms)
        last = self.seen[-self.window :]
        spike = not math.isfinite(total)
        if len(last) >= self.window // 2:
            spike |= not total <= np.mean(last) + self.deviations * np.std(last, ddof=1)
        if math.isfinite(total):
            self.seen.append(total)
        return [1.0] * ROWS, spike


class _EachByItself:
    """A rule for one norm, once for each segment; norms of 0 are not there."""

    def __init__(self, make: Callable[[], Callable[[float, bool], float]]) -> None:
        self.rules = [make() for _ in range(ROWS)]

    def __call__(self, norms: np.ndarray) -> tuple[list[float], bool]:
        limits = [rule(norm, norm > 0) for rule, norm in zip(self.rules, norms.tolist())]  # noqa: B905
        with np.errstate(invalid="ignore"):
            factors = np.minimum(np.array(limits) / (norms + 1e-6), 1.0)
        return [1.0 if math.isinf(t) else f for t, f in zip(limits, factors.tolist())], False  # noqa: B905


def _autoclip() -> Callable[[float, bool], float]:
    history: list[float] = []

    def rule(norm: float, enters: bool) -> float:
        if math.isfinite(norm) and enters:
            history.append(norm)
        return float(np.percentile(history[-16:], 60)) if len(history) >= 4 else math.inf

    return rule


def _zclip() -> Callable[[float, bool], float]:
    first: list[float] = []
    known = [0.0, 0.0]

    def rule(norm: float, enters: bool) -> float:
        enters = enters and math.isfinite(norm)
        if len(first) < 10:
            if enters:
                first.append(norm)
            known[:] = [float(np.mean(first)), float(np.var(first))] if first else known
            return math.inf
        mean, variance = known
        if not math.isfinite(norm):
            return mean
        score = (norm - mean) / (math.sqrt(variance) + 1e-6)
        limit = mean + 4.0 / score * math.sqrt(variance) if score > 2.0 else math.inf
        if enters:
            value = min(norm, limit)
            known[0] = 0.9 * mean + 0.1 * value
            known[1] = 0.9 * variance + 0.1 * (value - known[0]) ** 2
        return limit

    return rule


Transcription = Callable[[np.ndarray], tuple[list[float], bool]]
RULES: dict[str, tuple[Callable[[], Policy], Callable[[], Transcription]]] = {
    "AdaGC": (lambda: AdaGC(warmup=100), lambda: AdaGCByThePaper(1.05, 1.0, 0.98, 100)),
    "AdaGC, other numbers": (
        lambda: AdaGC(1.5, 20.0, 0.7, warmup=7),
        lambda: AdaGCByThePaper(1.5, 20.0, 0.7, 7),
    ),
    "SkipSpikes": (lambda: SkipSpikes(0.5, 16), lambda: SkipSpikesByOlmo(0.5, 16)),
    "AutoClip": (lambda: AutoClip(60, 16, 4), lambda: _EachByItself(_autoclip)),
    "ZClip": (lambda: ZClip(0.9, 2.0, 10), lambda: _EachByItself(_zclip)),
}
Decided = list[tuple[list[float], bool]]


def decisions(policy: Policy, steps: Sequence[np.ndarray], via: Any = None) -> Decided:
    decide = policy.decide if via is None else via
    out = []
    for row in steps:
        decision = decide(torch.from_numpy(row), None)
        skip = False if decision.skip is None else bool(decision.skip)
        out.append((decision.coefficients.tolist(), skip))
    return out


def same(actual: Decided, expected: Decided, rtol: float = 1e-9) -> bool:
    return all(
        a[1] == e[1] and np.allclose(a[0], e[0], rtol=rtol, atol=0, equal_nan=True)
        for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RULES)
def test_the_rule_by_segment(name: str, seed: int) -> None:
    make, transcribe = RULES[name]
    steps, rule = norms_by_segment(seed), transcribe()
    expected = [rule(row) for row in steps]
    assert same(decisions(make(), steps), expected)
    acted = sum(skip or any(f < 1 for f in factors) for factors, skip in expected)
    assert acted > 10


def test_the_comparison_can_fail() -> None:
    """The twin: other numbers are other decisions."""
    steps, rule = norms_by_segment(), AdaGCByThePaper(1.05, 1.0, 0.98, 100)
    expected = [rule(row) for row in steps]
    for other in (AdaGC(1.06), AdaGC(1.05, 1.01), AdaGC(beta=0.981), AdaGC(warmup=101)):
        assert not same(decisions(other, steps), expected)
    spikes = SkipSpikesByOlmo(0.5, 16)
    expected = [spikes(row) for row in steps]
    for skips in (SkipSpikes(0.6, 16), SkipSpikes(0.5, 15)):
        assert not same(decisions(skips, steps), expected)


@pytest.mark.parametrize("done", [0, 50, 137])
@pytest.mark.parametrize("name", RULES)
def test_resumed_bit_for_bit(name: str, done: int, tmp_path: Any) -> None:
    steps, make = norms_by_segment(), RULES[name][0]
    policy = make()
    first = decisions(policy, steps[:done])
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    rest = decisions(resumed, steps[done:])
    assert repr(first + rest) == repr(decisions(make(), steps))
    if done:
        assert repr(decisions(make(), steps[done:])) != repr(rest)  # the twin


@pytest.mark.parametrize("name", RULES)
def test_no_value_is_read_on_the_host(name: str) -> None:
    """On device meta there is none to read: what would wait for a GPU raises here."""
    policy = RULES[name][0]()
    for _ in range(3):
        decision = policy.decide(torch.zeros(ROWS, device="meta"))
    assert decision.coefficients.device.type == "meta"


@pytest.mark.parametrize("name", RULES)
def test_compiled(name: str) -> None:
    steps, make = norms_by_segment()[:140], RULES[name][0]
    eager, policy = make(), make()
    decisions(policy, steps[:1])  # the memory has its rows
    compiled = torch.compile(policy.decide, backend="eager", fullgraph=name != "SkipSpikes")
    expected = decisions(eager, steps)[1:]
    assert same(decisions(policy, steps[1:], compiled), expected, rtol=1e-12)


# In a Clipper ------------------------------------------------------------------------------------


def _params(row: np.ndarray) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(4)) for _ in row]
    _give(params, row)
    return params


def _give(params: Sequence[nn.Parameter], row: np.ndarray) -> None:
    """Gradients of these norms; none for 0."""
    for p, norm in zip(params, row.tolist(), strict=True):
        p.grad = torch.full((4,), norm / 2.0) if norm != 0 else None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("scope", ["parameter", "group"])
@pytest.mark.parametrize("name", ["AdaGC", "AutoClip", "ZClip"])
def test_a_clipper_by_scope(name: str, scope: str, backend: str) -> None:
    """AdaGC's steps after the warm-up are one native call on the CPU, the reference's are two."""
    make, transcribe = RULES[name]
    steps, rule = norms_by_segment(), transcribe()
    params = _params(steps[0])
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=0.1)
    clipper = fusedclip.Clipper(optimizer, make(), scope=scope, backend=backend)
    for row in steps[:240]:
        _give(params, row)
        clipper.clip_()
        factors, _ = rule(row)
        for p, norm, factor in zip(params, row.tolist(), factors, strict=True):
            if p.grad is not None:
                torch.testing.assert_close(
                    p.grad[0].item(), norm / 2 * factor, rtol=2e-6, atol=0, equal_nan=True
                )


def test_adagc_is_one_pass_after_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedclip.backends import cpu

    calls: list[str] = []
    for function in ("clip_", "measure", "scale_"):
        inner = getattr(cpu, function)
        monkeypatch.setattr(
            cpu,
            function,
            lambda *a, f=function, g=inner, **k: (calls.append(f), g(*a, **k))[1],
        )
    params = _params(np.ones(ROWS))
    clipper = fusedclip.Clipper(params, AdaGC(warmup=2), scope="parameter", monitor=True)
    for _ in range(4):
        clipper.clip_()
    assert calls == ["measure", "scale_"] * 2 + ["clip_"] * 2


def test_a_resumed_clipper_goes_on_in_one_pass() -> None:
    params = _params(np.ones(ROWS))
    clipper = fusedclip.Clipper(params, AdaGC(warmup=2), scope="parameter")
    for _ in range(3):
        clipper.clip_()
    state = copy.deepcopy(clipper.state_dict())
    resumed = fusedclip.Clipper(params, AdaGC(warmup=2), scope="parameter")
    resumed.load_state_dict(state)
    rows = norms_by_segment()[150:200]
    results = []
    for own in (clipper, resumed):
        for row in rows:
            _give(params, row)
            own.clip_()
            results.append([p.grad.clone() for p in params if p.grad is not None])
    first, second = results[: len(rows)], results[len(rows) :]
    for a, b in zip(first, second, strict=True):
        assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_parameters_that_are_added_have_rows_of_their_own() -> None:
    policy = AdaGC(warmup=2)
    model = nn.ParameterList([nn.Parameter(torch.zeros(4))])
    clipper = fusedclip.Clipper(model, policy, scope="parameter")
    for _ in range(3):
        model[0].grad = torch.ones(4)
        clipper.clip_()
    model.append(nn.Parameter(torch.zeros(4)))
    model[1].grad = torch.ones(4)
    clipper.clip_()
    state = policy.state_dict()
    assert state["seen"].tolist() == [2, 1]  # counted up to the end of the warm-up
    with pytest.raises(ValueError, match=r"AdaGC: expected 2 norms .* got 1; give each Clipper"):
        policy.threshold(torch.tensor(1.0))


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("policy", [1.0, torch.tensor(1.0), *RULES], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("amp", [False, True])
def test_every_combination_trains(scope: str, policy: Any, name: str, amp: bool) -> None:
    """scope × policy × monitor × attach × AMP: the steps of a clip by hand and a plain step."""
    makers = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    }
    results = []
    for attached in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizer = makers[name](
            [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        )
        limit = RULES[policy][0]() if isinstance(policy, str) else policy
        clipper = fusedclip.Clipper(optimizer, limit, scope=scope, monitor=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=amp)
        if attached:
            clipper.attach(optimizer, allow_sync=True)
        for step in range(6):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            scaler.scale(model(x).square().sum() * (1 + 9 * (step == 4))).backward()
            if attached:
                scaler.step(optimizer)
            else:
                scaler.unscale_(optimizer)
                clipper.carry_out()
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert clipper.monitor is not None and clipper.monitor.summary().steps == 6
        results.append(model)
    for p, q in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


# Steps that are left out -----------------------------------------------------------------------


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    kept = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state.values():
        kept += [value.clone() for value in state.values() if isinstance(value, Tensor)]
    return kept


SKIPS: dict[str, dict[str, Any]] = {
    "skip_above": {"max_norm": 1.0, "skip_above": 100.0},
    "a tensor": {"max_norm": 1.0, "skip_above": torch.tensor(100.0, dtype=torch.float64)},
    "SkipSpikes": {"max_norm": SkipSpikes(6.0, 8)},
    "SkipSpikes and a number": {"max_norm": 1.0, "skip_above": SkipSpikes(6.0, 8)},
    "SkipSpikes and AdaGC": {
        "max_norm": AdaGC(warmup=3),
        "skip_above": SkipSpikes(6.0, 8),
        "scope": "parameter",
    },
    "by group": {"max_norm": 1.0, "skip_above": 100.0, "scope": "group"},
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW fused", "SGD fused", "Adagrad fused"])
@pytest.mark.parametrize("kind", SKIPS)
@pytest.mark.parametrize("bad", [1e5, math.nan])
def test_a_step_that_is_left_out_changes_no_byte(
    kind: str, name: str, bad: float, amp: bool
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    make = getattr(torch.optim, name.split()[0])
    optimizer = make(
        model.parameters(),
        lr=0.01,
        fused="fused" in name,
        **{"momentum": 0.9} if make is torch.optim.SGD else {},
    )
    settings = {key: copy.deepcopy(value) for key, value in SKIPS[kind].items()}
    clipper = fusedclip.Clipper(optimizer, monitor=True, **settings)
    clipper.attach(optimizer, allow_sync="fused" not in name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=amp)
    for step in range(10):
        before = _state(model, optimizer)
        factor = bad if step in (7, 8) else 1.0
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().sum() * factor).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if amp and not math.isnan(bad):
            assert scaler.get_scale() == scale  # a spike is no overflow
        optimizer.zero_grad()
        kept = [same_bits(a, b) for a, b in zip(before, _state(model, optimizer), strict=False)]
        left_out = step == 7 or (step == 8 and (math.isnan(bad) or "Spikes" not in kind))
        if step != 8 or left_out:  # a second spike is not one to a policy that has seen the first
            assert all(kept) if left_out else not all(kept), step


def test_a_loss_that_stands_out_is_left_out() -> None:
    policy = SkipSpikes(6.0, 8)
    for step in range(6):
        policy.observe(2.0 + 0.01 * step)
        assert not policy.decide(torch.tensor(1.0 + 0.01 * step)).skip
    assert not policy.decide(torch.tensor(1.0)).skip  # without a loss the norm alone
    policy.observe(torch.tensor(2.0))
    assert not policy.decide(torch.tensor(1.0)).skip
    policy.observe(torch.tensor(200.0))
    assert policy.decide(torch.tensor(1.0)).skip
    policy.observe(math.nan)
    assert policy.decide(torch.tensor(1.0)).skip
    with pytest.raises(ValueError, match=r"loss: expected one element, got shape \(2,\)"):
        policy.observe(torch.zeros(2))


def test_leaving_out_needs_an_optimizer() -> None:
    p = nn.Parameter(torch.zeros(2))
    for clipper in (
        fusedclip.Clipper([p], SkipSpikes()),
        fusedclip.Clipper([p], 1.0, skip_above=3.0),
    ):
        with pytest.raises(RuntimeError, match=r"leaves out a step .*attach\(optimizer\)"):
            clipper.clip_()
        with pytest.raises(ValueError, match=r"SGD cannot leave out a step .*allow_sync=True"):
            clipper.attach(torch.optim.SGD([p], lr=0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaGC(relative=0), "relative: expected a number in (0, inf), got 0"),
        (lambda: AdaGC(absolute=-1.0), "absolute: expected a number in (0, inf), got -1.0"),
        (lambda: AdaGC(beta=1.0), "beta: expected a number in (0, 1), got 1.0"),
        (lambda: AdaGC(warmup=0), "warmup: expected an integer >= 1, got 0"),
        (lambda: SkipSpikes(deviations=0), "deviations: expected a number in (0, inf), got 0"),
        (lambda: SkipSpikes(window=3), "window: expected an integer >= 4, got 3"),
    ],
)
def test_validation(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message
