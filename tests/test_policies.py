"""AutoClip, ZClip and agc_ against their papers' rules, written once more in numpy."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import AutoClip, ZClip, agc_
from tests.helpers import FLOAT_DTYPES, same_bits


def autoclip_by_the_paper(
    norms: Sequence[float], percentile: float, window: int, warmup: int = 0
) -> Iterator[float]:
    """Seetharaman et al. 2020, over a window: the percentile of all norms so far."""
    history: list[float] = []
    for norm in norms:
        if math.isfinite(norm):
            history.append(norm)
        few = len(history) < max(warmup, 1)
        yield math.inf if few else float(np.percentile(history[-window:], percentile))


def zclip_by_the_paper(
    norms: Sequence[float], alpha: float, z: float, warmup: int, eps: float = 1e-6
) -> Iterator[float]:
    """Kumar et al. 2025: start from the mean and variance of the first norms, then averages."""
    first: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        if len(first) < warmup:
            if math.isfinite(norm):
                first.append(norm)
            if len(first) == warmup:
                mean, variance = float(np.mean(first)), float(np.var(first))
            yield math.inf
            continue
        if not math.isfinite(norm):
            yield mean
            continue
        deviation = math.sqrt(variance)
        score = (norm - mean) / (deviation + eps)
        threshold = math.inf
        if score > z:
            threshold = mean + z * z / score * deviation
        clipped = min(norm, threshold)
        mean = alpha * mean + (1 - alpha) * clipped
        variance = alpha * variance + (1 - alpha) * (clipped - mean) ** 2
        yield threshold


def training_norms(steps: int = 300, seed: int = 0) -> list[float]:
    """Norms that decay and vary, with spikes, NaN and infinity, also at the very beginning."""
    rng = np.random.default_rng(seed)
    norms = (1 + 3 * np.exp(-np.arange(steps) / 50)) * rng.lognormal(0.0, 0.2, steps)
    norms[rng.choice(steps, 12, replace=False)] *= 20
    norms[rng.choice(steps, 5, replace=False)] = np.nan
    norms[rng.choice(steps, 5, replace=False)] = np.inf
    norms[[0, 1, 40]] = np.nan, np.inf, 0.0
    norms[60:70] = norms[59]  # ties
    return norms.astype(np.float32).tolist()


def thresholds(policy: AutoClip | ZClip, norms: Sequence[float]) -> list[float]:
    out = []
    for norm in norms:
        threshold = policy.threshold(torch.tensor(norm, dtype=torch.float32))
        assert threshold.dim() == 0
        assert threshold.dtype == torch.float64
        out.append(threshold.item())
    return out


def same_thresholds(actual: Sequence[float], expected: Sequence[float]) -> bool:
    return np.allclose(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize("window", [6, 7, 64, 299, 10_000])
@pytest.mark.parametrize("percentile", [10, 50.0, 97.3, 100])
def test_autoclip(percentile: float, window: int, warmup: int, seed: int) -> None:
    norms = training_norms(seed=seed)
    expected = list(autoclip_by_the_paper(norms, percentile, window, warmup))
    assert same_thresholds(thresholds(AutoClip(percentile, window, warmup), norms), expected)


def test_autoclip_remembers_one_norm() -> None:
    assert thresholds(AutoClip(30, window=1), [3.0, math.nan, 5.0, 4.0]) == [3.0, 3.0, 5.0, 4.0]


def test_autoclip_before_any_norm() -> None:
    assert thresholds(AutoClip(), [math.nan, math.inf, 2.0]) == [math.inf, math.inf, 2.0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warmup", [1, 2, 25])
@pytest.mark.parametrize("z", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.5, 0.97])
def test_zclip(alpha: float, z: float, warmup: int, seed: int) -> None:
    norms = training_norms(seed=seed)
    expected = list(zclip_by_the_paper(norms, alpha, z, warmup))
    assert sum(map(math.isfinite, expected)) > 12  # some were clipped
    assert same_thresholds(thresholds(ZClip(alpha, z, warmup), norms), expected)


def test_zclip_defaults_are_the_papers() -> None:
    norms = training_norms()
    assert same_thresholds(
        thresholds(ZClip(), norms), list(zclip_by_the_paper(norms, 0.97, 2.5, 25))
    )


def test_zclip_of_a_larger_spike_is_a_smaller_threshold() -> None:
    """The reciprocal adjustment, and its limit for infinity: the mean."""
    calm = [1.0, 1.25, 0.75, 1.5, 0.5]
    first, second, last = (
        thresholds(ZClip(warmup=5), [*calm, spike])[-1] for spike in (2.0, 20.0, math.inf)
    )
    assert math.inf > first > second > last == pytest.approx(1.0, rel=1e-15)


def test_norms_that_do_not_vary() -> None:
    assert thresholds(ZClip(warmup=2), [1.0] * 5) == [math.inf] * 5
    assert thresholds(AutoClip(50), [1.0] * 5) == [1.0] * 5


def test_a_threshold_is_a_max_norm() -> None:
    """A spike is clipped to it; an ordinary step is not written at all."""
    policy = ZClip(warmup=2)
    parameter = nn.Parameter(torch.zeros(2))
    for norm, expected in [(1.0, 1.0), (3.0, 3.0), (2.0, 2.0), (40.0, None)]:
        parameter.grad = torch.tensor([0.6 * norm, 0.8 * norm])
        threshold = policy.threshold(fusedclip.clip_(parameter, math.inf))
        version = parameter.grad._version
        fusedclip.clip_(parameter, threshold)
        assert (parameter.grad._version == version) == (expected is not None)
        assert parameter.grad.norm().item() == pytest.approx(expected or threshold.item())


@pytest.mark.parametrize(
    "other",
    [
        autoclip_by_the_paper(training_norms(), 50, 32),
        autoclip_by_the_paper(training_norms(), 51, 33),
        autoclip_by_the_paper(training_norms(), 51, 32, 3),
        autoclip_by_the_paper([1.0 if n != n else n for n in training_norms()], 51, 32),
    ],
    ids=["another percentile", "another window", "a warm-up", "NaN counted"],
)
def test_the_comparison_with_autoclip_can_fail(other: Iterator[float]) -> None:
    assert not same_thresholds(thresholds(AutoClip(51, 32), training_norms()), list(other))


@pytest.mark.parametrize(
    "other",
    [
        zclip_by_the_paper(training_norms(), 0.96, 2.5, 25),
        zclip_by_the_paper(training_norms(), 0.97, 2.6, 25),
        zclip_by_the_paper(training_norms(), 0.97, 2.5, 24),
        zclip_by_the_paper(training_norms(), 0.97, 2.5, 25, eps=1e-4),
    ],
    ids=["alpha", "z", "warm-up", "eps"],
)
def test_the_comparison_with_zclip_can_fail(other: Iterator[float]) -> None:
    assert not same_thresholds(thresholds(ZClip(), training_norms()), list(other))


MAKERS: dict[str, Callable[[], AutoClip | ZClip]] = {
    "AutoClip": lambda: AutoClip(30, window=16, warmup=4),
    "ZClip": lambda: ZClip(0.9, 2.0, warmup=10),
}


@pytest.mark.parametrize("done", [0, 3, 10, 137])
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_continues_bit_for_bit(name: str, done: int, tmp_path: Any) -> None:
    norms = training_norms()
    whole, resumed = MAKERS[name](), MAKERS[name]()
    thresholds(whole, norms[:done])
    torch.save(whole.state_dict(), tmp_path / "policy.pt")
    thresholds(resumed, [7.0, 8.0])  # what it knew before is gone
    resumed.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    assert thresholds(whole, norms[done:]) == thresholds(resumed, norms[done:])


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_without_its_state_does_not(name: str) -> None:
    norms = training_norms()
    assert thresholds(MAKERS[name](), norms)[137:] != thresholds(MAKERS[name](), norms[137:])


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_dict_is_a_copy(name: str) -> None:
    policy = MAKERS[name]()
    thresholds(policy, [1.0, 2.0])
    state = policy.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    thresholds(policy, [3.0, 4.0])
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    policy.load_state_dict(state)
    thresholds(policy, [3.0, 4.0])
    assert all(torch.equal(state[key], kept[key]) for key in kept)


@pytest.mark.parametrize("name", MAKERS)
def test_fp64_norms_are_not_rounded(name: str) -> None:
    norms = [x + 1e-12 for x in training_norms() if math.isfinite(x)]
    wide, narrow = MAKERS[name](), MAKERS[name]()
    differ = [
        wide.threshold(torch.tensor(x, dtype=torch.float64))
        != narrow.threshold(torch.tensor(x, dtype=torch.float32))
        for x in norms
    ]
    assert any(differ)


@pytest.mark.parametrize("name", MAKERS)
def test_no_value_is_read_on_the_host(name: str) -> None:
    """On device meta there is none to read: what would wait for a GPU raises here."""
    policy = MAKERS[name]()
    for _ in range(3):
        threshold = policy.threshold(torch.zeros((), device="meta"))
    assert threshold.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(threshold > 1)  # the check can fail


@pytest.mark.parametrize("name", MAKERS)
def test_loaded_before_the_first_norm_of_another_device(name: str) -> None:
    policy = MAKERS[name]()
    thresholds(policy, [1.0, 2.0])
    resumed = MAKERS[name]()
    resumed.load_state_dict(policy.state_dict())
    resumed.threshold(torch.zeros((), device="meta"))
    assert all(value.device.type == "meta" for value in resumed.state_dict().values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoClip(-1), "percentile: expected a number in (0, 100], got -1"),
        (lambda: AutoClip(0), "percentile: expected a number in (0, 100], got 0"),
        (lambda: AutoClip(100.5), "percentile: expected a number in (0, 100], got 100.5"),
        (lambda: AutoClip(math.nan), "percentile: expected a number in (0, 100], got nan"),
        (lambda: AutoClip("10"), "percentile: expected a number in (0, 100], got '10'"),
        (lambda: AutoClip(True), "percentile: expected a number in (0, 100], got True"),
        (lambda: AutoClip(window=0), "window: expected an integer >= 1, got 0"),
        (lambda: AutoClip(window=None), "window: expected an integer >= 1, got None"),
        (lambda: AutoClip(window=2.5), "window: expected an integer >= 1, got 2.5"),
        (lambda: AutoClip(warmup=-1), "warmup: expected an integer >= 0, got -1"),
        (lambda: AutoClip(window=4, warmup=5), "warmup: expected at most window=4 norms, got 5"),
        (lambda: ZClip(alpha=1.0), "alpha: expected a number in (0, 1), got 1.0"),
        (lambda: ZClip(alpha=0.0), "alpha: expected a number in (0, 1), got 0.0"),
        (lambda: ZClip(z=0), "z: expected a number in (0, inf), got 0"),
        (lambda: ZClip(z=math.inf), "z: expected a number in (0, inf), got inf"),
        (lambda: ZClip(warmup=0), "warmup: expected an integer >= 1, got 0"),
        (lambda: ZClip(eps=0), "eps: expected a number in (0, inf), got 0"),
        (lambda: agc_([], clip_factor=0), "clip_factor: expected a number in (0, inf), got 0"),
        (lambda: agc_([], eps=-1e-3), "eps: expected a number in (0, inf), got -0.001"),
        (
            lambda: ZClip().threshold(torch.ones(1, 2)),
            "norm: expected a 0-dim float tensor or a vector of them by segment, got shape (1, 2), "
            "torch.float32",
        ),
        (
            lambda: AutoClip(window=4).load_state_dict(AutoClip(window=5).state_dict()),
            "state_dict['history']: expected a tensor of shape (rows, 4), got (1, 5); load it "
            "into a AutoClip made with the same arguments",
        ),
        (
            lambda: ZClip().load_state_dict(AutoClip().state_dict()),
            "state_dict['mean']: expected a tensor of shape (rows,), got None; load it into a "
            "ZClip made with the same arguments",
        ),
    ],
)
def test_validation(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_configuration_is_frozen_and_shown() -> None:
    policy = AutoClip(90, window=5)
    assert repr(policy) == "AutoClip(percentile=90, window=5, warmup=0)"
    assert repr(ZClip()) == "ZClip(alpha=0.97, z=2.5, warmup=25, eps=1e-06)"
    with pytest.raises(AttributeError):
        policy.percentile = 50  # type: ignore[misc]


# agc_: the products of a factor of fp32 (fp64 for fp64), rounded once.
AGC_RTOL = {
    torch.float32: 2.0**-22,
    torch.float64: 1e-14,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def agc_by_the_paper(weight: Tensor, grad: Tensor, clip_factor: float, eps: float) -> np.ndarray:
    """Brock et al. 2021, in fp64: by output unit, or as a whole for vectors and scalars."""
    w, g = weight.detach().double().numpy(), grad.double().numpy()
    units = len(w) if w.ndim > 1 else 1
    w, rows = w.reshape(units, -1), g.reshape(units, -1).copy()
    for i in range(units):
        norm = math.sqrt(sum(x * x for x in rows[i]))
        limit = clip_factor * max(math.sqrt(sum(x * x for x in w[i])), eps)
        if norm > limit:
            rows[i] *= limit / norm
    return rows.reshape(g.shape)


def _parameter(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """With some units above their limit and some below."""
    units = [shape[0], *[1] * (len(shape) - 1)] if len(shape) > 1 else []
    steps = math.prod(units)
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    parameter.grad = (torch.randn(shape) * torch.logspace(1, -3, steps).reshape(units)).to(dtype)
    return parameter


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (7, 5), (4, 3, 5), (6, 3, 2, 5), (1, 1), (3, 0)])
def test_agc(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = _parameter(shape, dtype)
    before = parameter.grad.clone()
    expected = agc_by_the_paper(parameter, before, 0.05, 1e-3)
    agc_([parameter], clip_factor=0.05, eps=1e-3)
    torch.testing.assert_close(
        parameter.grad.double(),
        torch.from_numpy(expected),
        rtol=AGC_RTOL[dtype],
        atol=2.0**-24 if dtype == torch.float16 else 1e-40,
    )
    for row, old, wanted in zip(
        parameter.grad.reshape(-1), before.reshape(-1), expected.reshape(-1), strict=True
    ):
        if wanted == old.item():
            assert same_bits(row, old)  # units below their limit stay bit for bit


def test_the_comparison_with_agc_can_fail() -> None:
    """A norm of the whole tensor is not a norm by unit."""
    parameter = _parameter((7, 5))
    expected = agc_by_the_paper(parameter, parameter.grad, 0.05, 1e-3)
    whole = nn.Parameter(parameter.detach().reshape(-1))
    whole.grad = parameter.grad.reshape(-1).clone()
    agc_([whole], clip_factor=0.05)
    assert not np.allclose(whole.grad.numpy(), expected.reshape(-1), rtol=1e-3)


def test_agc_defaults_are_the_papers() -> None:
    parameter = _parameter((7, 5))
    expected = agc_by_the_paper(parameter, parameter.grad, 0.01, 1e-3)
    agc_(parameter)
    np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=2.0**-22)


def test_agc_of_zeros() -> None:
    """A parameter at 0 moves, by eps; a gradient of 0 stays; one without gradient is skipped."""
    still, zero, none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    still.grad, zero.grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, -0.0, 0.0])
    agc_([none, still, zero], clip_factor=0.5, eps=1e-2)
    torch.testing.assert_close(still.grad, torch.tensor([3e-3, 4e-3, 0.0]))
    assert same_bits(zero.grad, torch.tensor([0.0, -0.0, 0.0]))
    assert none.grad is None
    agc_([])


def test_agc_of_numbers_that_are_not_finite_stays_in_its_unit() -> None:
    parameter = nn.Parameter(torch.ones(4, 2))
    parameter.grad = torch.tensor([[math.nan, 1], [math.inf, 1], [3, 4], [1e30, 1e30]])
    agc_(parameter, clip_factor=0.5)
    half = 0.5 * math.sqrt(2.0)
    expected = torch.tensor(
        [[math.nan, math.nan], [math.nan, 0.0], [0.6 * half, 0.8 * half], [0.5, 0.5]]
    )
    torch.testing.assert_close(parameter.grad, expected, equal_nan=True)


def test_agc_takes_models_and_optimizers_and_each_parameter_once() -> None:
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().mul(100).backward()
    grad = layer.weight.grad.clone()
    expected = agc_by_the_paper(layer.weight, grad, 0.01, 1e-3)
    for given in (layer, torch.optim.SGD(layer.parameters()), [layer.weight, layer.weight]):
        layer.weight.grad = grad.clone()
        agc_(given)
        np.testing.assert_allclose(layer.weight.grad.numpy(), expected, rtol=2.0**-22)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(4).to_sparse(), "grads[1]: expected a dense gradient, got torch.sparse_coo;"),
        (
            torch.ones(4, dtype=torch.complex64),
            "grads[1]: expected a real floating-point gradient, got torch.complex64;",
        ),
    ],
    ids=["sparse", "complex"],
)
def test_agc_refuses_before_anything_is_modified(grad: Tensor, message: str) -> None:
    good = nn.Parameter(torch.ones(2))
    good.grad = torch.full((2,), 100.0)
    bad = nn.Parameter(torch.ones(4, dtype=grad.dtype))
    bad.grad = grad
    with pytest.raises(ValueError) as error:
        agc_([good, bad])
    assert str(error.value).startswith(message)
    assert (good.grad == 100).all()


def test_agc_refuses_what_is_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="named_parameters"):
        fusedclip.agc_(nn.Linear(2, 2).named_parameters())  # type: ignore[arg-type]
