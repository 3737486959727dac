"""The one doorway: each way of clipping is announced once, and asks for a monitor once."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import amp, call
from fusedclip.call import Clipped
from fusedclip.monitor import Monitor
from fusedclip.policies import POLICIES
from tests.helpers import parameters

MAX_NORM = 0.5
SCALE = 2.0**10


class Heard:
    """What listeners are told and observers are asked."""

    def __init__(self) -> None:
        self.clips: list[Clipped] = []
        self.asked = 0
        self.monitor = Monitor(math.inf)

    def heard(self, clipped: Clipped) -> None:
        self.clips.append(clipped)

    def observe(self, tensors: Sequence[Tensor]) -> Monitor:
        self.asked += 1
        return self.monitor


@pytest.fixture
def heard() -> Iterator[Heard]:
    listener = Heard()
    call.listeners.add(listener)
    call.observers.append(listener.observe)
    yield listener
    call.observers.remove(listener.observe)
    call.listeners.discard(listener)


def _params() -> list[nn.Parameter]:
    return parameters(torch.tensor([3.0]), torch.tensor([4.0]))


def _optimizer(params: list[nn.Parameter], fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, fused=fused)


def _attached(fused: bool, **options: object) -> Callable[[list[nn.Parameter]], None]:
    def clip(params: list[nn.Parameter]) -> None:
        optimizer = _optimizer(params, fused)
        fusedclip.Clipper(params, MAX_NORM, **options).attach(optimizer, allow_sync=True)
        optimizer.step()

    return clip


def _clipper(**options: object) -> Callable[[list[nn.Parameter]], None]:
    return lambda params: fusedclip.Clipper(_optimizer(params), MAX_NORM, **options).clip_()


def _scaled(params: list[nn.Parameter], scaler: torch.amp.GradScaler) -> None:
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad *= SCALE


def _scaler(fused: bool, enabled: bool = True) -> Callable[[list[nn.Parameter]], None]:
    def clip(params: list[nn.Parameter]) -> None:
        scaler = amp.GradScaler("cpu", init_scale=SCALE, max_norm=MAX_NORM, enabled=enabled)
        if enabled:
            _scaled(params, scaler)
        scaler.step(_optimizer(params, fused))

    return clip


def _unscale_and_clip(enabled: bool) -> Callable[[list[nn.Parameter]], None]:
    def clip(params: list[nn.Parameter]) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=enabled)
        if enabled:
            _scaled(params, scaler)
        amp.unscale_and_clip_(scaler, _optimizer(params), MAX_NORM)

    return clip


def _compiled(params: list[nn.Parameter]) -> None:
    torch.compile(lambda: fusedclip.clip_(params, MAX_NORM), backend="aot_eager", fullgraph=True)()


# Every way to clip by a norm: the public name → its entries.
ENTRIES: dict[str, dict[str, Callable[[list[nn.Parameter]], object]]] = {
    "clip_": {
        "clip_": lambda params: fusedclip.clip_(params, MAX_NORM),
        "clip_, infinity": lambda params: fusedclip.clip_(params, MAX_NORM, math.inf),
        "clip_, norm_type=1": lambda params: fusedclip.clip_(params, MAX_NORM, 1.0),
        "clip_, tensor": lambda params: fusedclip.clip_(params, torch.tensor(MAX_NORM)),
        "clip_, reference": lambda params: fusedclip.clip_(params, MAX_NORM, backend="reference"),
        "compiled": _compiled,
    },
    "clip_grad_norm_": {"clip_grad_norm_": lambda ps: fusedclip.clip_grad_norm_(ps, MAX_NORM)},
    "clip_grads_with_norm_": {
        "clip_grads_with_norm_": lambda params: fusedclip.clip_grads_with_norm_(
            params, MAX_NORM, torch.tensor(5.0)
        )
    },
    "agc_": {"agc_": lambda params: fusedclip.agc_(params)},
    "Clipper": {
        "Clipper": _clipper(),
        "Clipper, groups": _clipper(scope="group"),
        "Clipper, parameters": _clipper(scope="parameter"),
        "attached": _attached(fused=False),
        "attached, fused": _attached(fused=True),
        "attached, groups": _attached(fused=True, scope="parameter"),
        "attached, skip": _attached(fused=False, nonfinite="skip"),
        "attached, fused, skip": _attached(fused=True, nonfinite="skip"),
    },
    "amp": {
        "GradScaler": _scaler(fused=False),
        "GradScaler, fused": _scaler(fused=True),
        "GradScaler, disabled": _scaler(fused=False, enabled=False),
        "unscale_and_clip_": _unscale_and_clip(enabled=True),
        "unscale_and_clip_, disabled": _unscale_and_clip(enabled=False),
    },
}
_CASES = {name: entry for entries in ENTRIES.values() for name, entry in entries.items()}
# Public, and no clip by a norm.
_OTHERS = {
    "ClipConfig", "Monitor", "NonfiniteGradientError", "Recommendation", "__version__",
    "available_backends", "clip_grad_value_", "get_tensor_norms", "get_total_norm", "patch",
    "recommend", "unpatch", *(kind.__name__ for kind in POLICIES.values()),
}  # fmt: skip


@pytest.mark.parametrize("name", _CASES)
def test_each_clip_is_announced_once(name: str, heard: Heard) -> None:
    params = _params()
    _CASES[name](params)
    (clipped,) = heard.clips
    assert heard.asked == 1
    assert len(clipped.tensors) == 2
    if name == "agc_":  # no threshold of all: what was left of the norm
        assert clipped.norm == 5.0 and 0 < float(clipped.threshold) < 5.0
        return
    limits = torch.as_tensor(clipped.threshold, dtype=torch.float64)
    assert (limits == MAX_NORM).all()
    orders = {"clip_, infinity": 4.0, "clip_, norm_type=1": 7.0}
    assert clipped.norm is not None
    if clipped.norm.dim() == 0:
        assert clipped.norm == orders.get(name, 5.0)
    summary = heard.monitor.summary()
    assert summary.steps == 1 and summary.clipped == 1.0


def test_a_policy_is_announced_with_the_threshold_that_it_set(heard: Heard) -> None:
    policy = fusedclip.AutoClip(percentile=50)
    fusedclip.Clipper(_params(), policy).clip_()
    (clipped,) = heard.clips
    assert clipped.threshold == 5.0


def test_every_public_way_to_clip_is_listed() -> None:
    """The twin: a new public function has to be sorted into one of the two lists."""
    assert set(fusedclip.__all__) - _OTHERS == set(ENTRIES) - {"amp"}
    scalers = {
        name
        for name, value in vars(amp).items()
        if value.__class__ in (type, type(_params)) and inspect.getmodule(value) is amp
        if not name.startswith("_")
    }
    assert scalers == {"GradScaler", "unscale_and_clip_"}


def test_functions_that_only_look_are_not_announced(heard: Heard) -> None:
    grads = [p.grad for p in _params()]
    fusedclip.get_total_norm(grads)
    fusedclip.get_tensor_norms(grads)
    assert heard.clips == [] and heard.asked == 0


def test_a_clipper_with_a_monitor_and_an_observer_both_know(heard: Heard) -> None:
    clipper = fusedclip.Clipper(_params(), MAX_NORM, monitor=True)
    clipper.clip_()
    assert clipper.monitor is not None
    for monitor in (clipper.monitor, heard.monitor):
        assert monitor.summary().last_norm == 5.0
        assert monitor.state_dict()["tensor_norms"].tolist() == [[3.0, 4.0]]


def test_a_call_that_fails_is_not_announced(heard: Heard) -> None:
    params = parameters(torch.tensor([math.nan]))
    with pytest.raises(fusedclip.NonfiniteGradientError):
        fusedclip.clip_(params, MAX_NORM, error_if_nonfinite=True)
    assert heard.clips == []
    assert heard.monitor.summary().nonfinite_steps == 1


class TestWhatWasHeardBelongsToTheGradients:
    """An attached Clipper leaves alone what another clip has rescaled, and nothing else."""

    def _attach(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=1.0)
        fusedclip.Clipper(params, 1.0).attach(optimizer)
        return optimizer

    @staticmethod
    def _moved(params: list[nn.Parameter]) -> float:
        return float(torch.cat([p.detach().flatten() for p in params]).norm())

    @pytest.mark.filterwarnings("ignore:fusedclip. the gradients were clipped")
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_a_step_left_out(self, set_to_none: bool) -> None:
        params = _params()
        optimizer = self._attach(params)
        fusedclip.clip_(params, 2.0)
        optimizer.zero_grad(set_to_none=set_to_none)  # the step is left out
        for p in params:
            (p * 10.0).sum().backward()
        optimizer.step()
        assert self._moved(params) == pytest.approx(1.0)

    def test_accumulated_into_after_the_clip(self) -> None:
        params = _params()
        optimizer = self._attach(params)
        fusedclip.clip_(params, 2.0)
        for p in params:
            (p * 10.0).sum().backward()
        optimizer.step()
        assert self._moved(params) == pytest.approx(1.0)

    def test_the_same_gradients_are_left_alone(self) -> None:
        params = _params()
        optimizer = self._attach(params)
        fusedclip.clip_(params, 2.0)
        with pytest.warns(UserWarning, match="clipped before"):
            optimizer.step()
        assert self._moved(params) == pytest.approx(2.0)

    def test_a_clip_that_changed_nothing_counts_as_one(self) -> None:
        params = _params()
        optimizer = self._attach(params)
        fusedclip.clip_(params, 100.0)
        with pytest.warns(UserWarning, match="clipped before"):
            optimizer.step()
        assert self._moved(params) == pytest.approx(5.0)
