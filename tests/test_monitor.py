"""Monitor: norms from the clip's own pass, statistics, what is named, what survives."""

import io
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedclip
from fusedclip.monitor import Monitor, readback
from tests.conftest import ON_GPU
from tests.helpers import SMALL, parameters, same_bits

LISTS: dict[str, Callable[[], list[Tensor | None]]] = {
    "fp32": lambda: [torch.randn(70_000), torch.randn(3, 5), torch.randn(())],
    "mixed dtypes": lambda: [
        torch.randn(100), torch.randn(7).double(), torch.randn(9).half(), torch.randn(8).bfloat16(),
    ],
    "frozen and empty": lambda: [None, torch.randn(5), None, torch.zeros(0), torch.randn(2), None],
    "sparse beside dense": lambda: [torch.randn(4), torch.eye(3).to_sparse(), torch.randn(6)],
}  # fmt: skip


def _rows(monitor: Monitor) -> Tensor:
    rows = monitor.state_dict()["tensor_norms"]
    assert isinstance(rows, Tensor)
    return rows


def _expected(params: list[nn.Parameter], order: float) -> Tensor:
    """The norm of each gradient in fp64, 0 where there is none."""
    norms = [
        0.0
        if p.grad is None or not p.grad.numel()
        else torch.linalg.vector_norm(p.grad.to_dense().double(), order).item()
        for p in params
    ]
    return torch.tensor(norms, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("order", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e9, "policy"])
def test_the_clip_leaves_the_norm_of_each_parameter(
    name: str, order: float, max_norm: float | str, backend: str
) -> None:
    torch.manual_seed(3)
    params = parameters(*LISTS[name]())
    expected = _expected(params, order)
    limit = fusedclip.AutoClip(percentile=50) if max_norm == "policy" else max_norm
    clipper = fusedclip.Clipper(params, limit, norm_type=order, monitor=True, backend=backend)
    norm = clipper.clip_()
    assert clipper.monitor is not None
    summary = clipper.monitor.summary()
    assert summary.last_norm == norm.item()
    torch.testing.assert_close(_rows(clipper.monitor)[0], expected, rtol=5e-7, atol=0.0)
    assert summary.max_norm == (norm.item() if max_norm == "policy" else max_norm)


@pytest.mark.parametrize("infinity", [False, True])
def test_a_watched_clip_does_the_same_bits(infinity: bool, backend: str) -> None:
    order = math.inf if infinity else 2.0
    for limit in (1e9, 0.3):
        torch.manual_seed(5)
        grads = [torch.randn(n) for n in (200_000, 1, 77)]
        plain, watched = (parameters(*(g.clone() for g in grads)) for _ in range(2))
        norm = fusedclip.Clipper(plain, limit, norm_type=order, backend=backend).clip_()
        clipper = fusedclip.Clipper(watched, limit, norm_type=order, backend=backend, monitor=True)
        assert same_bits(clipper.clip_(), norm)
        for p, q in zip(plain, watched, strict=True):
            assert same_bits(p.grad, q.grad)


def test_it_is_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second read: with dense CPU gradients nothing but the fused clip is called."""
    if ON_GPU:
        pytest.skip("about the CPU backend; on a GPU launches are counted in test_gpu.py")
    for name in ("measure", "scale_"):
        monkeypatch.setattr(
            f"fusedclip.backends.cpu.{name}", lambda *a, **k: pytest.fail("a second pass")
        )
    params = parameters(torch.randn(40), torch.randn(9))
    fusedclip.Clipper(params, 0.1, monitor=True, backend="cpu").clip_()


def test_a_fused_optimizer_is_watched_too() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = fusedclip.Clipper(model, 0.5, monitor=True)
    clipper.attach(optimizer)
    model(torch.ones(2, 4)).sum().backward()
    expected = _expected(list(model.parameters()), 2.0)
    optimizer.step()
    assert clipper.monitor is not None and clipper.last_norm is not None
    torch.testing.assert_close(_rows(clipper.monitor)[0], expected, rtol=5e-7, atol=0.0)
    assert clipper.monitor.summary().last_norm == clipper.last_norm.item()


def test_under_amp_the_norms_are_unscaled() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    clipper = fusedclip.Clipper(model, 0.5, monitor=True)
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler(model.weight.device.type, init_scale=1024.0)
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    expected = _expected(list(model.parameters()), 2.0) / 1024.0
    scaler.step(optimizer)
    assert clipper.monitor is not None
    torch.testing.assert_close(_rows(clipper.monitor)[0], expected, rtol=1e-6, atol=0.0)


def test_a_planted_culprit_is_named_first() -> None:
    layers, steps = (30, 6) if SMALL else (300, 30)
    bad_layer, bad_step = layers // 2, steps // 2
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(layers)))
    clipper = fusedclip.Clipper(model, 1.0, monitor=True)
    for step in range(steps):
        for number, p in enumerate(model.parameters()):
            p.grad = 0.01 * torch.randn(8, 8)
            if step == bad_step and number == bad_layer:
                p.grad *= 15
        clipper.clip_()
    assert clipper.monitor is not None
    summary = clipper.monitor.summary()
    first, second = summary.top[:2]
    assert (first.name, summary.max_step) == (f"{bad_layer}.weight", bad_step)
    assert first.norm > 8 * second.norm and first.norm == pytest.approx(15 * 0.08, rel=0.2)
    assert first.share == pytest.approx(225 / (224 + layers), abs=0.15) and second.share < 0.02
    assert summary.typical == pytest.approx(0.08, rel=0.1)
    lines = str(summary).splitlines()
    assert any(line.split()[:1] == [first.name] for line in lines)
    typical = f"{summary.typical:.3g}"
    assert any("(median of all)" in line and typical in line for line in lines)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "error"])
def test_a_bad_step_names_its_parameter(nonfinite: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    clipper = fusedclip.Clipper(model, 1.0, nonfinite=nonfinite, monitor=True)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step == 1:
            model[1].bias.grad[0] = math.nan
            model[0].weight.grad[1, 1] = math.inf
        try:
            clipper.clip_()
        except fusedclip.NonfiniteGradientError:
            assert nonfinite == "error" and step == 1
    assert clipper.monitor is not None
    summary = clipper.monitor.summary()
    assert (summary.steps, summary.nonfinite_steps, summary.nonfinite_step) == (3, 1, 1)
    assert summary.nonfinite_names == ("0.weight", "1.bias")
    assert "1 steps, the last one 1 in 0.weight, 1.bias" in str(summary)


@given(
    norms=st.lists(
        st.one_of(st.floats(0.0, 1e6), st.sampled_from([math.nan, math.inf])), min_size=1,
        max_size=40,
    ),
    window=st.integers(1, 12),
)  # fmt: skip
def test_statistics_are_numpys(norms: list[float], window: int) -> None:
    monitor = Monitor(100.0, window)
    for norm in norms:
        monitor.update(norm)
    summary = monitor.summary()
    recent = numpy.array(norms[-window:])
    finite = recent[numpy.isfinite(recent)]
    assert (summary.steps, summary.window) == (len(norms), len(recent))
    assert summary.nonfinite_steps == sum(not math.isfinite(x) for x in norms)
    assert summary.nonfinite_recently == len(recent) - len(finite)
    coefficients = numpy.minimum(1.0, 100.0 / (finite + 1e-6))
    assert summary.clipped == pytest.approx(sum(coefficients < 1.0) / len(recent))
    assert summary.above_0_9 == pytest.approx(sum(finite > 90.0) / len(recent))
    assert summary.above_0_95 == pytest.approx(sum(finite > 95.0) / len(recent))
    assert summary.below_0_3 == pytest.approx(sum(finite / 100.0 < 0.3) / len(recent))
    if len(finite):
        assert summary.median == pytest.approx(numpy.quantile(finite, 0.5))
        assert summary.p95 == pytest.approx(numpy.quantile(finite, 0.95))
        assert summary.mean_coefficient == pytest.approx(coefficients.mean())
        assert norms[summary.max_step] == summary.max == finite.max()
    else:
        assert math.isnan(summary.median) and summary.max_step == -1


def test_without_a_finite_norm_nobody_contributes() -> None:
    monitor = Monitor(1.0, names=["a", "b"])
    monitor.update(math.nan, torch.tensor([math.nan, 2.0]))
    summary = monitor.summary()
    assert summary.top == () and math.isnan(summary.max) and summary.max_step == -1
    assert summary.nonfinite_names == ("a",)


def test_nothing_yet() -> None:
    monitor = Monitor(1.0)
    assert str(monitor.summary()) == "No steps yet."
    assert monitor.metrics() == {}
    assert monitor.log_line(0, loss=1.0) == "[Train Step 0] loss=1.00"
    assert str(monitor.advice()) == "0 steps are too few to judge; ask again after 20."


def test_a_hundred_thousand_steps_take_bounded_memory() -> None:
    monitor = Monitor(1.0, window=64)
    row = torch.arange(5.0, device="cpu")

    def size() -> int:
        state = monitor.state_dict()
        assert state["norms"].numel() <= 64 and state["tensor_norms"].shape[0] <= 64
        stream = io.BytesIO()
        torch.save(monitor, stream)  # all that it holds
        return stream.tell()

    for step in range(100):
        monitor.update(float(step % 7), row)
    early = size()
    for step in range(100, 100_000):
        monitor.update(float(step % 7), row)
    assert monitor.summary().steps == 100_000
    assert size() <= early + 256  # larger numbers in the pickle


def test_the_state_survives_a_checkpoint() -> None:
    torch.manual_seed(0)
    norms = [float(x) for x in torch.rand(50) * 3] + [math.nan]
    rows = torch.rand(51, 4)
    whole, first = Monitor(1.0, window=20), Monitor(1.0, window=20)
    for step, norm in enumerate(norms):
        whole.update(norm, rows[step])
        if step < 30:
            first.update(norm, rows[step])
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    resumed = Monitor(1.0, window=20)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    for step in range(30, 51):
        resumed.update(norms[step], rows[step])
    assert repr(resumed.summary()) == repr(whole.summary())  # NaN equals itself in a repr
    torch.testing.assert_close(_rows(resumed), _rows(whole), equal_nan=True)
    smaller = Monitor(1.0, window=5)
    smaller.load_state_dict(whole.state_dict())
    assert smaller.summary().window == 5 and smaller.summary().steps == 51


def test_a_clipper_carries_its_monitor_in_a_checkpoint() -> None:
    model = nn.Linear(2, 2)
    clipper = fusedclip.Clipper(model, fusedclip.ZClip(), monitor=True)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        clipper.clip_()
    resumed = fusedclip.Clipper(model, fusedclip.ZClip(), monitor=True)
    resumed.load_state_dict(clipper.state_dict())
    assert clipper.monitor is not None and resumed.monitor is not None
    assert repr(resumed.monitor.summary()) == repr(clipper.monitor.summary())
    assert resumed.monitor.names == ["weight", "bias"]
    old = {"max_norm": clipper.state_dict()["max_norm"]}  # of a version without monitors
    resumed.load_state_dict(old)
    fusedclip.Clipper(model, fusedclip.ZClip()).load_state_dict(clipper.state_dict())


def test_parameters_may_come_and_go() -> None:
    layers = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    model = nn.Sequential(*layers[:2])
    clipper = fusedclip.Clipper(model, 1.0, monitor=True)
    for step in range(4):
        if step == 2:
            model.append(layers[2])
        for p in model.parameters():
            p.grad = torch.full_like(p, float(step + 1))
        clipper.clip_()
    assert clipper.monitor is not None
    rows = _rows(clipper.monitor)
    assert rows.shape == (4, 3) and rows[:2].isnan().all() and (rows[3] == 8.0).all()
    assert clipper.monitor.names == ["0.weight", "1.weight", "2.weight"]
    clipper.monitor.update(3.0)  # a step of which only the norm is known
    assert _rows(clipper.monitor)[4].isnan().all()


class _Late:
    """An event of a device that is behind: the copy is made when it gets there."""

    def __init__(self, values: Tensor, host: Tensor) -> None:
        self._values, self.host = values.clone(), host
        self.done = False
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        return self.done

    def synchronize(self) -> None:
        self.host.copy_(self._values)
        self.done = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[_Late]:
    """Tensors count as a device's; what was copied, in order."""
    copies: list[_Late] = []

    def start_copy(values: Tensor, host: Tensor) -> _Late:
        host.fill_(-1.0)
        copies.append(_Late(values, host))
        return copies[-1]

    def on_host(value: object) -> bool:
        return not isinstance(value, Tensor) or value.numel() == 0

    monkeypatch.setattr(readback, "on_host", on_host)
    monkeypatch.setattr("fusedclip.monitor.monitor.on_host", on_host)
    monkeypatch.setattr(readback, "_start_copy", start_copy)
    monkeypatch.setattr(readback, "_pinned", lambda n: torch.empty(n, dtype=torch.float64))
    return copies


def test_update_never_waits_for_a_device(device: list[_Late]) -> None:
    """The twin of test_gpu.py's: what has not arrived is not asked for before an answer."""
    monitor = Monitor(1.0, window=8)
    for step in range(3):
        monitor.update(torch.tensor(float(step)), torch.tensor([step + 0.5]))
    assert [copy.done for copy in device] == [False] * 3
    device[1].synchronize()  # out of order: it has to wait for the first
    monitor.update(torch.tensor(3.0), torch.tensor([3.5]))
    assert [copy.queries for copy in device] == [4, 0, 0, 0]
    device[0].synchronize()
    monitor.update(4.0)  # known at once, but behind the others
    assert [copy.queries for copy in device] == [5, 1, 1, 0, 0]  # two were taken in
    summary = monitor.summary()  # waits
    assert summary.steps == 5 and all(copy.done for copy in device)
    assert monitor.state_dict()["norms"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert _rows(monitor)[:4, 0].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_pinned_memory_is_reused(device: list[_Late]) -> None:
    monitor = Monitor(torch.tensor(1.0))
    for _ in range(50):
        monitor.update(torch.tensor(2.0), torch.ones(3))
        device[-1].synchronize()
    assert len({copy.host.data_ptr() for copy in device}) <= 2
    old = [weakref.ref(copy.host) for copy in device]
    for _ in range(3):
        monitor.update(torch.tensor(2.0), torch.ones(4))  # another list of parameters
        device[-1].synchronize()
    monitor.summary()
    new = [weakref.ref(copy.host) for copy in device[50:]]
    device.clear()
    assert {host() for host in old} == {None}  # no longer of use
    assert {host() for host in new} != {None}


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "window": (lambda: Monitor(1.0, window=0), ValueError, "window: expected an integer >= 1"),
    "max_norm": (lambda: Monitor(-1.0), ValueError, "max_norm: expected a threshold >= 0"),
    "norm": (
        lambda: Monitor(1.0).update(torch.ones(2, 2)), ValueError, r"norm: .* got shape \(2, 2\)",
    ),
    "text": (lambda: Monitor(1.0).update("1"), TypeError, "norm: expected a number"),
    "tensor norms": (
        lambda: Monitor(1.0).update(1.0, torch.ones(())), ValueError, "tensor_norms: expected",
    ),
    "monitor": (
        lambda: fusedclip.Clipper([], 1.0, monitor=3), TypeError, "expected True or a Monitor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_rejected_step_changes_nothing() -> None:
    monitor = Monitor(1.0)
    monitor.update(2.0, torch.ones(3))
    with pytest.raises(ValueError):
        monitor.update(3.0, torch.ones(3, 3))
    assert monitor.summary().steps == 1


def test_no_gradient_is_a_norm_of_zero() -> None:
    clipper = fusedclip.Clipper(nn.Linear(2, 2), 1.0, monitor=True)
    clipper.clip_()
    assert clipper.monitor is not None
    summary = clipper.monitor.summary()
    assert (summary.steps, summary.last_norm, summary.top) == (1, 0.0, ())


def test_a_monitor_of_ones_own(tmp_path: Path) -> None:
    monitor = Monitor(1.0, names=["w", "b"])
    clipper = fusedclip.Clipper(nn.Linear(2, 1), 1.0, monitor=monitor)
    for p in clipper.parameters.parameters():
        p.grad = torch.ones_like(p)
    clipper.clip_()
    assert clipper.monitor is monitor and monitor.names == ["w", "b"]
    assert monitor.summary().top[0].name == "w"
