"""Mixed precision: the same scripts played to torch's scaler and to fusedclip's.

Gradients are given, not computed from the parameters, so that a difference of rounding does not
grow with the steps.
"""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import amp
from fusedclip.backends import cpu, cuda, reference, triton
from tests.conftest import ON_GPU
from tests.helpers import (
    FLOAT_DTYPES,
    SMALL,
    assert_norm,
    assert_scaled,
    clones,
    exact_coefficient,
    exact_norm,
    parameters,
    same_bits,
)

DEVICE = "cuda" if ON_GPU else "cpu"
MAX_NORM = 0.5
SCALER = {"init_scale": 64.0, "growth_interval": 3}

# torch multiplies twice, and for bfloat16 it rounds the norm, the coefficient and each product to
# 8 bits. A fused optimizer's `grad_scale` is fp32 for fp64 gradients too. Steps add up.
PARAMETER_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 3e-2}

OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    # No momentum: when its first step is skipped, torch goes on with a buffer that was never set.
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@dataclass
class Loop:
    """A training loop with two models, whose scaler clips by itself or is torch's."""

    optimizer: str
    dtype: torch.dtype
    make: Callable[..., Any]
    models: list[list[nn.Parameter]] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    clipped: set[int] = field(default_factory=set)
    moment: int = 0

    def __post_init__(self) -> None:
        self.scaler = self.make(DEVICE, **SCALER)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for sizes in ((3, 40), (17,)):
            values = [torch.randn(n, generator=generator, device=DEVICE) for n in sizes]
            self.models.append([nn.Parameter(v.to(self.dtype)) for v in values])
            self.optimizers.append(OPTIMIZERS[self.optimizer](self.models[-1]))

    @property
    def clips(self) -> bool:
        return isinstance(self.scaler, amp.GradScaler)

    def backward(self, which: int = 0, bad: float | None = None) -> None:
        self.moment += 1
        generator = torch.Generator(DEVICE).manual_seed(self.moment)
        loss = 0.0
        for p in self.models[which]:
            p.grad = None
            data = torch.randn(p.shape, generator=generator, device=DEVICE).to(self.dtype)
            loss = loss + (p * data).sum()
        self.scaler.scale(loss).backward()
        if bad is not None:
            self.models[which][-1].grad[5] = bad

    def unscale(self, which: int = 0) -> None:
        self.scaler.unscale_(self.optimizers[which])
        if not self.clips:
            nn.utils.clip_grad_norm_(self.models[which], MAX_NORM)
        self.clipped.add(which)

    def step(self, which: int = 0, **arguments: Any) -> None:
        scaled = self.scaler._scale is not None
        if scaled and not self.clips and which not in self.clipped and not arguments:
            self.unscale(which)
        self.scaler.step(self.optimizers[which], **arguments)

    def update(self, new_scale: Any = None) -> None:
        self.scaler.update(new_scale)
        self.clipped.clear()

    def train(self, bad: float | None = None) -> None:
        self.backward(0, bad)
        self.step()
        self.update()

    def save_and_load(self) -> None:
        state = self.scaler.state_dict()
        self.scaler = self.make(DEVICE)
        self.scaler.load_state_dict(state)

    def pickle(self) -> None:
        self.scaler = pickle.loads(pickle.dumps(self.scaler))

    def deepcopy(self) -> None:
        self.scaler = copy.deepcopy(self.scaler)

    def no_gradients(self) -> None:
        self.scaler.scale(torch.ones((), device=DEVICE))
        self.optimizers[0].zero_grad()

    def steps_taken(self) -> list[float]:
        """By each parameter's own count, where its optimizer keeps one."""
        states = [state for o in self.optimizers for state in o.state.values()]
        return [float(state["step"]) for state in states if "step" in state]


Event = tuple[Any, ...]
INF, NAN = math.inf, math.nan
SCRIPTS: dict[str, list[Event]] = {
    "ordinary": 4 * [("train",)],
    "overflows": [("train", bad) for bad in (INF, None, NAN, -INF, None, None, None, None, NAN)],
    "grows": 10 * [("train",)],
    "explicit unscale_": 4 * [("backward",), ("unscale",), ("step",), ("update",)],
    "explicit unscale_ of an overflow": [
        ("train",), ("backward", 0, INF), ("unscale",), ("step",), ("update",), ("train",),
    ],
    "unscale_ twice": [("backward",), ("unscale",), ("unscale",), ("step",), ("update",)],
    "step twice": [("backward",), ("step",), ("step",), ("update",), ("train",)],
    "unscale_ after step": [("backward",), ("step",), ("unscale",), ("update",)],
    "a scale by hand": [("train",), ("backward",), ("step",), ("update", 8.0), ("train",)],
    "a scale in a tensor": [
        ("backward",), ("step",), ("update", torch.tensor(16.0, device=DEVICE)), ("train",),
    ],
    "closures": [("backward",), ("closure",), ("step",), ("update",)],
    "unscale_ before scale": [("unscale",), ("train",)],
    "step before scale": [("step",), ("train",)],
    "update before scale": [("update",), ("train",)],
    "update without a step": [("backward",), ("update",), ("step",), ("update",)],
    "no gradients": [("train",), ("no_gradients",), ("step",), ("update",), ("train",)],
    "two optimizers": 3 * [
        ("backward", 0), ("backward", 1), ("step", 0), ("step", 1), ("update",),
    ],
    "one of two overflows": [
        ("backward", 0, INF), ("backward", 1), ("step", 0), ("step", 1), ("update",),
        ("backward", 0), ("backward", 1, NAN), ("unscale", 1), ("step", 0), ("step", 1),
        ("update",), ("train",),
    ],
    "save and load": [("train",), ("train",), ("save_and_load",), ("train", INF), ("train",)],
    "pickle": [("train",), ("train",), ("pickle",), ("train",), ("train",)],
    "deepcopy": [("train",), ("train",), ("deepcopy",), ("train",), ("train",)],
    "pickle between": [("backward",), ("step",), ("pickle",), ("update",), ("train",)],
}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """What is seen after an event."""

    error: str
    scale: float
    growth: int
    state: dict[str, Any]
    steps: list[float]
    values: list[Tensor]


def play(script: list[Event], loop: Loop) -> list[Moment]:
    seen = []
    for name, *arguments in script:
        error = ""
        try:
            if name == "closure":
                loop.step(closure=lambda: torch.zeros(()))
            else:
                getattr(loop, name)(*arguments)
        except (RuntimeError, AssertionError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        scaler = loop.scaler
        seen.append(
            Moment(
                error, scaler.get_scale(), scaler._get_growth_tracker(), scaler.state_dict(),
                loop.steps_taken(), [p.detach().clone() for m in loop.models for p in m],
            )
        )  # fmt: skip
    return seen


def assert_agree(script: list[Event], mine: Loop, other: Loop) -> None:
    last: tuple[Moment, Moment] | None = None
    for ours, theirs in zip(play(script, mine), play(script, other), strict=True):
        assert ours.error == theirs.error
        assert (ours.scale, ours.growth) == (theirs.scale, theirs.growth)
        assert ours.state == theirs.state
        assert ours.steps == theirs.steps
        for value, other_value in zip(ours.values, theirs.values, strict=True):
            tolerance = PARAMETER_TOLERANCE[value.dtype]
            torch.testing.assert_close(value, other_value, rtol=tolerance, atol=tolerance)
        if last is not None:
            assert _moved(ours, last[0]) == _moved(theirs, last[1])
        last = (ours, theirs)


def _moved(moment: Moment, last: Moment) -> list[bool]:
    """Whether each parameter changed: a skipped step leaves every bit."""
    pairs = zip(moment.values, last.values, strict=True)
    return [not torch.equal(value, before) for value, before in pairs]


def scaler_of(backend: str, kind: type = amp.GradScaler) -> Callable[..., amp.GradScaler]:
    return lambda *args, **kwargs: kind(*args, max_norm=MAX_NORM, backend=backend, **kwargs)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused adamw"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_as_torch_does(script: str, optimizer: str, backend: str) -> None:
    mine = Loop(optimizer, torch.float32, scaler_of(backend))
    assert_agree(SCRIPTS[script], mine, Loop(optimizer, torch.float32, torch.amp.GradScaler))


@pytest.mark.parametrize("dtype", PARAMETER_TOLERANCE, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_dtype(optimizer: str, dtype: torch.dtype, backend: str) -> None:
    script = SCRIPTS["overflows"] + SCRIPTS["one of two overflows"]
    mine = Loop(optimizer, dtype, scaler_of(backend))
    assert_agree(script, mine, Loop(optimizer, dtype, torch.amp.GradScaler))


class _BlindToOverflow(amp.GradScaler):
    def _unscale_grads_(self, *args: Any) -> Any:
        return {k: torch.zeros_like(v) for k, v in super()._unscale_grads_(*args).items()}

    def _check_inf_per_device(self, optimizer: Any) -> Any:
        for flag in super()._check_inf_per_device(optimizer).values():
            flag.zero_()


class _Unclipped(amp.GradScaler):
    @property
    def max_norm(self) -> float:
        return math.inf

    @max_norm.setter
    def max_norm(self, value: float) -> None: ...


class _Forgetful(amp.GradScaler):
    def update(self, new_scale: Any = None) -> None:
        super().update(new_scale)
        self._growth_tracker.zero_()


@pytest.mark.parametrize("broken", [_BlindToOverflow, _Unclipped, _Forgetful])
@pytest.mark.parametrize("optimizer", ["sgd", "fused sgd"])
def test_the_comparison_can_fail(broken: type, optimizer: str) -> None:
    """The twin: a scaler with a fault does not pass."""
    mine = Loop(optimizer, torch.float32, scaler_of("auto", broken))
    with pytest.raises(AssertionError):
        assert_agree(
            SCRIPTS["overflows"], mine, Loop(optimizer, torch.float32, torch.amp.GradScaler)
        )


def _scaled(
    *grads: Tensor, scale: float = 1024.0, fused: bool = False, **options: Any
) -> tuple[list[nn.Parameter], torch.optim.Optimizer, amp.GradScaler]:
    """Parameters with the gradients that a loss scaled by ``scale`` gives them."""
    params = parameters(*grads)
    scaler = amp.GradScaler(DEVICE, init_scale=scale, **{"max_norm": MAX_NORM, **options})
    scaler.scale(torch.ones((), device=DEVICE))
    return params, torch.optim.SGD(params, lr=1.0, fused=fused), scaler


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.0])
@pytest.mark.parametrize("bites", [True, False])
def test_norm_and_gradients_against_fp64(norm_type: float, bites: bool, backend: str) -> None:
    dtypes = [d for d in FLOAT_DTYPES if d != torch.float16]
    grads = [torch.randn(n).to(d) * 1024 for n in (5, 3000) for d in dtypes]
    before = [g.clone() for g in grads]
    max_norm = 0.01 if bites else 1e6
    params, optimizer, scaler = _scaled(
        *grads, max_norm=max_norm, norm_type=norm_type, backend=backend
    )
    scaler.unscale_(optimizer)
    norm = exact_norm([g.double() / 1024 for g in before], norm_type)
    assert_norm(scaler.last_norm, norm, exact_products=False)
    # By the norm as it is given, since an fp64 gradient shows every digit of the factor.
    factor = exact_coefficient(scaler.last_norm.item(), max_norm) / 1024
    for p, old in zip(params, before, strict=True):
        assert_scaled(p.grad, old, factor)


@pytest.mark.parametrize("bad", [INF, NAN])
def test_overflowed_gradients_are_unscaled_and_not_clipped(bad: float, backend: str) -> None:
    grads = [torch.randn(100) * 1024 for _ in range(3)]
    grads[1][7] = bad
    params, optimizer, scaler = _scaled(*grads, backend=backend)
    twins = parameters(*clones(params))
    theirs = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    theirs.scale(torch.ones((), device=DEVICE))
    theirs.unscale_(torch.optim.SGD(twins, lr=1.0))
    scaler.unscale_(optimizer)
    assert not scaler.last_norm.isfinite()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, twin.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fused", [False, True])
def test_finite_gradients_of_any_size_are_no_overflow(fused: bool, backend: str) -> None:
    """Their scaled norm exceeds fp32, the true one does not."""
    params, optimizer, scaler = _scaled(
        torch.full((100,), 1e38), max_norm=1e35, fused=fused, backend=backend
    )
    scaler.step(optimizer)
    assert_norm(scaler.last_norm, 1e39 / 1024, exact_products=False)
    (found,) = scaler._found_inf_per_device(optimizer).values()
    assert found == 0
    torch.testing.assert_close(params[0].detach(), torch.full((100,), -1e34))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes over the gradients that any backend makes."""
    made: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return call(*args, **kwargs)

        return run

    for backend in (cpu, cuda, triton, reference):
        for name in ("clip_", "measure", "scale_"):
            if hasattr(backend, name):
                monkeypatch.setattr(backend, name, counted(name, getattr(backend, name)))
    return made


def test_one_fused_pass(calls: list[str]) -> None:
    _, optimizer, scaler = _scaled(torch.randn(100), torch.randn(3))
    scaler.step(optimizer)
    assert calls == ["clip_"]


def test_fused_optimizers_cost_one_read(calls: list[str]) -> None:
    params, optimizer, scaler = _scaled(torch.randn(100), torch.randn(3), fused=True)
    before = clones(params)
    scaler.step(optimizer)
    assert calls == ["measure"]
    norm = exact_norm([old / 1024 for old in before])
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old / 1024 * -exact_coefficient(norm, MAX_NORM))


def test_odd_gradients_count_and_scale_too(calls: list[str]) -> None:
    """The twin of the counts: a sparse gradient needs two passes; still one norm."""
    indices = torch.tensor([[1, 1, 4]])
    values = torch.tensor([1024.0, 2048.0, 4096.0])
    sparse = torch.sparse_coo_tensor(indices, values, (6,), check_invariants=True)
    params, optimizer, scaler = _scaled(torch.full((4,), 6144.0), sparse)
    scaler.unscale_(optimizer)
    assert set(calls) == {"measure", "scale_"}
    assert scaler.last_norm == 13.0  # 3² + 4² + 4 · 6²
    torch.testing.assert_close(params[0].grad, torch.full((4,), 6 * MAX_NORM / 13))
    wanted = torch.tensor([0.0, 3.0, 0.0, 0.0, 4.0, 0.0]) * MAX_NORM / 13
    torch.testing.assert_close(params[1].grad.to_dense(), wanted)


def test_last_norm(backend: str) -> None:
    params, optimizer, scaler = _scaled(torch.tensor([3.0, 4.0]) * 1024, backend=backend)
    other = torch.optim.SGD(parameters(torch.tensor([6.0, 8.0]) * 1024), lr=0.1, fused=True)
    assert scaler.last_norm is None and scaler.last_norm_of(optimizer) is None
    scaler.step(optimizer)
    scaler.step(other)
    scaler.update()
    assert scaler.last_norm == scaler.last_norm_of(other) == 10.0
    assert scaler.last_norm_of(optimizer) == 5.0
    assert scaler.last_norm.dim() == 0 and scaler.last_norm.device == params[0].device
    assert pickle.loads(pickle.dumps(scaler)).last_norm is None


def test_max_norm_may_change_between_steps(backend: str) -> None:
    params, optimizer, scaler = _scaled(torch.tensor([3.0, 4.0]) * 1024, backend=backend)
    scaler.max_norm = torch.tensor(1.0)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
    scaler.update()
    scaler.max_norm = -1.0
    before = clones(params)
    with pytest.raises(ValueError, match="max_norm: expected a threshold >= 0"):
        scaler.step(optimizer)
    assert same_bits(params[0].grad, before[0])


@pytest.mark.parametrize(("size", "max_norm"), [(1.0, 0.0), (1e38, 1e-3)])
def test_a_fused_optimizer_sees_zeros_when_its_divisor_is_infinite(
    size: float, max_norm: float
) -> None:
    params, optimizer, scaler = _scaled(torch.full((9,), size), fused=True, max_norm=max_norm)
    scaler.step(optimizer)
    scaler.update()
    assert (params[0] == 0).all() and scaler.get_scale() == 1024.0


@pytest.mark.parametrize("divisor", [4.0, torch.tensor(4.0)], ids=["number", "tensor"])
def test_a_grad_scale_of_the_users_own_counts(divisor: Any) -> None:
    params, optimizer, scaler = _scaled(torch.tensor([3.0, 4.0]) * 4096, fused=True)
    optimizer.grad_scale = divisor
    scaler.step(optimizer)
    assert scaler.last_norm == 5.0
    torch.testing.assert_close(params[0].detach(), torch.tensor([-0.6, -0.8]) * MAX_NORM)


class TestAttributesOfOneStep:
    def _step_that_fails(self, make: Callable[..., torch.amp.GradScaler]) -> Any:
        params = parameters(torch.randn(10))
        optimizer = torch.optim.SGD(params, lr=0.1, fused=True)
        scaler = make(DEVICE)
        scaler.scale(torch.ones((), device=DEVICE))

        def fail(*args: Any) -> None:
            assert optimizer.grad_scale is not None and optimizer.found_inf == 0
            raise KeyError("a hook")

        optimizer.register_step_pre_hook(fail)
        with pytest.raises(KeyError, match="a hook"):
            scaler.step(optimizer)
        return optimizer

    def test_are_gone_whatever_happens(self) -> None:
        optimizer = self._step_that_fails(scaler_of("auto"))
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()

    def test_torch_leaves_them(self) -> None:
        """The twin: the check above would see them."""
        optimizer = self._step_that_fails(torch.amp.GradScaler)
        assert {"grad_scale", "found_inf"} <= vars(optimizer).keys()


class TestDisabled:
    def test_clips_and_steps(self, backend: str) -> None:
        params = parameters(torch.tensor([3.0, 4.0]))
        optimizer = torch.optim.SGD(params, lr=1.0)
        scaler = amp.GradScaler(DEVICE, enabled=False, max_norm=1.0, backend=backend)
        loss = torch.ones(())
        assert scaler.scale(loss) is loss
        scaler.step(optimizer)
        scaler.update()
        assert scaler.last_norm == 5.0
        torch.testing.assert_close(params[0].detach(), torch.tensor([-0.6, -0.8]))
        assert scaler.state_dict() == {} and scaler.get_scale() == 1.0
        assert not pickle.loads(pickle.dumps(scaler)).is_enabled()

    def test_clips_once(self) -> None:
        params = parameters(torch.tensor([3.0, 4.0]))
        optimizer = torch.optim.SGD(params, lr=1.0)
        scaler = amp.GradScaler(DEVICE, enabled=False, max_norm=1.0)
        for _ in range(2):
            params[0].grad = torch.tensor([3.0, 4.0])
            scaler.unscale_(optimizer)
            scaler.unscale_(optimizer)  # torch's disabled scaler allows it
            scaler.step(optimizer)
            assert scaler.last_norm == 5.0
        scaler.step(optimizer)  # of a next step: the gradients are those that were clipped
        torch.testing.assert_close(scaler.last_norm, torch.tensor(1.0))

    @pytest.mark.parametrize("by_name", [False, True])
    def test_a_closure_is_clipped_each_time(self, by_name: bool) -> None:
        params = parameters(torch.zeros(2))
        optimizer = torch.optim.SGD(params, lr=1.0)
        scaler = amp.GradScaler(DEVICE, enabled=False, max_norm=1.0)

        def closure() -> Tensor:
            params[0].grad = torch.tensor([3.0, 4.0])
            return torch.tensor(7.0)

        arguments: dict[str, Any] = {"closure": closure} if by_name else {}
        assert scaler.step(optimizer, *(() if by_name else (closure,)), **arguments) == 7.0
        assert scaler.last_norm == 5.0
        torch.testing.assert_close(params[0].detach(), torch.tensor([-0.6, -0.8]))

    @pytest.mark.parametrize("policy", ["propagate", "zero", "error"])
    def test_policies(self, policy: str) -> None:
        params = parameters(torch.tensor([1.0, math.nan]))
        optimizer = torch.optim.SGD(params, lr=1.0)
        scaler = amp.GradScaler(DEVICE, enabled=False, max_norm=1.0, nonfinite=policy)
        if policy == "error":
            with pytest.raises(fusedclip.NonfiniteGradientError):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        wanted = [math.nan, math.nan] if policy == "propagate" else [0.0, 0.0]
        torch.testing.assert_close(params[0].detach(), torch.tensor(wanted), equal_nan=True)


class TestFunction:
    """``unscale_and_clip_`` with torch's own scaler."""

    @pytest.fixture
    def scaler(self) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        scaler.scale(torch.ones((), device=DEVICE))
        return scaler

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_as_torch_does(self, optimizer: str, backend: str) -> None:
        class InOnePass(Loop):
            def unscale(self, which: int = 0) -> None:
                amp.unscale_and_clip_(
                    self.scaler, self.optimizers[which], MAX_NORM, backend=backend
                )
                self.clipped.add(which)

        script = SCRIPTS["overflows"] + SCRIPTS["one of two overflows"] + SCRIPTS["unscale_ twice"]
        mine, theirs = (
            loop(optimizer, torch.float32, torch.amp.GradScaler) for loop in (InOnePass, Loop)
        )
        assert_agree(script, mine, theirs)

    def test_norm_and_one_pass(self, scaler: torch.amp.GradScaler, calls: list[str]) -> None:
        params = parameters(torch.tensor([3.0, 4.0]) * 1024)
        optimizer = torch.optim.SGD(params, lr=1.0)
        assert amp.unscale_and_clip_(scaler, optimizer, 1.0) == 5.0
        assert calls == ["clip_"]
        torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
        assert "_unscale_grads_" not in vars(scaler)
        with pytest.raises(RuntimeError, match="has already been called on this optimizer"):
            amp.unscale_and_clip_(scaler, optimizer, 1.0)
        assert "_unscale_grads_" not in vars(scaler)
        scaler.step(optimizer)
        scaler.update()

    def test_without_a_scale(self) -> None:
        optimizer = torch.optim.SGD(parameters(torch.ones(3)), lr=1.0)
        with pytest.raises(AssertionError, match="Attempted unscale_ but _scale is None"):
            amp.unscale_and_clip_(torch.amp.GradScaler(DEVICE), optimizer, 1.0)

    def test_disabled(self) -> None:
        params = parameters(torch.tensor([3.0, 4.0]))
        scaler = torch.amp.GradScaler(DEVICE, enabled=False)
        optimizer = torch.optim.SGD(params, lr=1.0)
        assert amp.unscale_and_clip_(scaler, optimizer, 1.0) == 5.0
        torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
        params[0].grad.fill_(math.nan)
        with pytest.raises(fusedclip.NonfiniteGradientError):
            amp.unscale_and_clip_(scaler, optimizer, 1.0, nonfinite="error")

    def test_bad_scalers(self) -> None:
        _, optimizer, own = _scaled(torch.ones(3))
        with pytest.raises(TypeError, match=r"clips by itself; call scaler\.unscale_"):
            amp.unscale_and_clip_(own, optimizer, 1.0)
        with pytest.raises(TypeError, match=r"expected a torch\.amp\.GradScaler, got float"):
            amp.unscale_and_clip_(1.0, optimizer, 1.0)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"max_norm": -1.0}, ValueError, "max_norm: expected a threshold >= 0"),
            ({"max_norm": math.nan}, ValueError, "max_norm: expected a threshold >= 0"),
            ({"max_norm": "1"}, TypeError, "max_norm: expected a number"),
            ({"norm_type": math.nan}, ValueError, "norm_type: expected a number"),
            ({"norm_type": 0.0}, ValueError, "norm_type: expected an order > 0, got 0.0"),
            ({"norm_type": -math.inf}, ValueError, "norm_type: expected an order > 0, got -inf"),
            ({"nonfinite": "unclipped"}, ValueError, "nonfinite: expected one of"),
            ({"backend": "nope"}, ValueError, "backend: expected one of"),
            ({"process_group": 3}, TypeError, "process_group: expected"),
        ],
    )
    def test_bad_arguments(
        self, scaler: torch.amp.GradScaler, arguments: Any, error: Any, message: str
    ) -> None:
        """Nothing is modified: the same call without the fault works afterwards."""
        params = parameters(torch.tensor([3.0, 4.0]) * 1024)
        optimizer = torch.optim.SGD(params, lr=1.0)
        with pytest.raises(error, match=message):
            amp.unscale_and_clip_(scaler, optimizer, **{"max_norm": 1.0, **arguments})
        assert amp.unscale_and_clip_(scaler, optimizer, 1.0) == 5.0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, TypeError, "max_norm"),
            ({"max_norm": -1.0}, ValueError, "max_norm: expected a threshold >= 0, got -1.0"),
            ({"max_norm": math.nan}, ValueError, "max_norm: expected a threshold >= 0, got nan"),
            ({"max_norm": None}, TypeError, "max_norm: expected a number"),
            ({"max_norm": 1.0, "norm_type": "two"}, ValueError, "norm_type: expected a number"),
            ({"max_norm": 1.0, "norm_type": -2.0}, ValueError, "norm_type: expected an order > 0"),
            ({"max_norm": 1.0, "nonfinite": "skip"}, ValueError, "nonfinite: expected one of"),
            ({"max_norm": 1.0, "growth_factor": 1.0}, AssertionError, "growth factor must be > 1"),
        ],
    )
    def test_arguments(self, arguments: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            amp.GradScaler(DEVICE, **arguments)

    @pytest.mark.parametrize("layout", ["dense", "sparse"])
    def test_float16_gradients(self, layout: str, backend: str) -> None:
        half = torch.ones(3, dtype=torch.float16)
        half = half.to_sparse() if layout == "sparse" else half
        params, optimizer, scaler = _scaled(torch.ones(3), half, backend=backend)
        message = r"^Attempting to unscale FP16 gradients\. .* grads\[1\] of shape \(3,\)"
        for act in (scaler.unscale_, scaler.step):
            with pytest.raises(ValueError, match=message):
                act(optimizer)
            assert (params[0].grad == 1).all()

    def test_an_optimizer_that_unscales_by_itself(self) -> None:
        class Own(torch.optim.SGD):
            _step_supports_amp_scaling = True

            def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
                raise AssertionError("must not be reached")

        params, _, scaler = _scaled(torch.ones(3))
        with pytest.raises(RuntimeError, match=r"Own\.step\(grad_scaler=\.\.\.\) unscales by it"):
            scaler.step(Own(params, lr=1.0))

    def test_an_optimizer_that_unscales_by_itself_and_nothing_to_clip(self) -> None:
        """With an infinite threshold it is handed the scaler, as torch hands its own."""
        handed = []

        class Own(torch.optim.SGD):
            _step_supports_amp_scaling = True

            def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
                handed.append(grad_scaler)

        params, _, scaler = _scaled(torch.ones(3))
        scaler.max_norm = math.inf
        with pytest.warns(FutureWarning, match="passing itself"):
            scaler.step(Own(params, lr=1.0))
        assert handed == [scaler]

    def test_layouts_that_nobody_takes(self) -> None:
        params, optimizer, scaler = _scaled(torch.ones(3))
        weight = nn.Parameter(torch.eye(3).to_sparse_csr())
        weight.grad = weight.detach().clone()
        optimizer.add_param_group({"params": [weight]})
        with pytest.raises(ValueError, match=r"grads\[1\].*torch.sparse_csr"):
            scaler.step(optimizer)
        assert (params[0].grad == 1).all()


@pytest.mark.skipif(SMALL, reason="the same on every backend")
def test_norms_do_not_keep_an_optimizer_alive() -> None:
    _, optimizer, scaler = _scaled(torch.ones(3))
    scaler.step(optimizer)
    scaler.update()
    assert len(scaler._norms) == 1
    del optimizer
    assert len(scaler._norms) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_no_host_sync_on_a_gpu(fused: bool) -> None:
    """But for the one of torch's own step, which asks whether to skip."""
    params = [nn.Parameter(torch.zeros(1000, device="cuda")) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(params, fused=fused)
    scaler = amp.GradScaler("cuda", max_norm=1.0)
    scaler.scale(torch.ones((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        if fused:
            scaler.step(optimizer)
        else:
            scaler.unscale_(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scaler.last_norm.is_cuda
