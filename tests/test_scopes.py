"""Thresholds by parameter group and by parameter, against one clip for each."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from tests.helpers import (
    FLOAT_DTYPES,
    assert_norm,
    assert_scaled,
    clones,
    exact_coefficient,
    exact_norm,
    parameters,
    same_bits,
)


def _mixed(count: int = 12) -> list[nn.Parameter]:
    sizes = (5, 3000, 1, 70)
    return parameters(
        *(
            (10.0 ** (i % 3) * torch.randn(sizes[i % 4])).to(FLOAT_DTYPES[i % 3])
            for i in range(count)
        )
    )


def _groups(params: list[nn.Parameter], **first: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": params[:3], **first}, {"params": params[3:4]}, {"params": params[4:]}], lr=0.1
    )


@pytest.mark.parametrize("order", [2.0, math.inf, 1.0])
def test_each_parameter_by_its_own_norm(backend: str, order: float) -> None:
    params = _mixed()
    params.insert(2, nn.Parameter(torch.zeros(3)))  # without gradient
    before = clones(params)
    norms = fusedclip.Clipper(
        params, 1.5, norm_type=order, scope="parameter", backend=backend
    ).clip_()
    assert norms.shape == (13,) and norms.dtype == torch.float64
    for p, old, norm in zip(params, before, norms, strict=True):
        if old is None:
            assert norm == 0
            continue
        exact = exact_norm([old], order)
        assert_norm(norm, exact, exact_products=False)
        assert_scaled(p.grad, old, exact_coefficient(norm.item(), 1.5))


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_each_group_by_its_own_norm_and_threshold(backend: str, order: float) -> None:
    params = _mixed()
    before = clones(params)
    optimizer = _groups(params, max_norm=0.25)
    clipper = fusedclip.Clipper(optimizer, 2.0, norm_type=order, scope="group", backend=backend)
    norms = clipper.clip_()
    for norm, limit, members in zip(
        norms, (0.25, 2.0, 2.0), (slice(0, 3), slice(3, 4), slice(4, None)), strict=True
    ):
        assert_norm(norm, exact_norm(before[members], order), exact_products=False)
        for p, old in zip(params[members], before[members], strict=True):
            assert_scaled(p.grad, old, exact_coefficient(norm.item(), limit))


def test_only_the_segment_above_its_threshold_is_written(backend: str) -> None:
    params = parameters(torch.ones(100), torch.ones(100))
    optimizer = torch.optim.SGD(
        [{"params": params[:1], "max_norm": 20.0}, {"params": params[1:]}], lr=0.1
    )
    fusedclip.Clipper(optimizer, 5.0, scope="group", backend=backend).clip_()
    assert (params[0].grad == 1.0).all()
    torch.testing.assert_close(params[1].grad, torch.full((100,), 0.5))


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "error"])
def test_a_bad_segment(backend: str, nonfinite: str) -> None:
    bad = torch.tensor([1.0, math.nan])
    params = parameters(torch.full((4,), 3.0), bad)
    before = clones(params)
    clipper = fusedclip.Clipper(
        params, 1.0, scope="parameter", nonfinite=nonfinite, backend=backend
    )
    if nonfinite == "error":
        with pytest.raises(fusedclip.NonfiniteGradientError, match=r"grads\[1\]"):
            clipper.clip_()
        assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))
        return
    norms = clipper.clip_()
    assert norms[0] == 6.0 and norms[1].isnan()
    torch.testing.assert_close(params[0].grad, torch.full((4,), 0.5))  # the good one is clipped
    if nonfinite == "zero":
        assert (params[1].grad == 0.0).all()
    else:
        assert params[1].grad.isnan().all()


def test_odd_gradients_have_segments_too(backend: str) -> None:
    holes = torch.full((4, 4), 2.0)[::2, ::2]
    params = parameters(torch.full((4,), 2.0), holes)
    norms = fusedclip.Clipper(params, 1.0, scope="parameter", backend=backend).clip_()
    assert norms.tolist() == [4.0, 4.0]
    for p in params:
        torch.testing.assert_close(p.grad, torch.full(p.shape, 0.5))


def test_nothing_to_clip() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert fusedclip.Clipper(params, 1.0, scope="parameter").clip_().tolist() == [0.0] * 3


def test_the_comparison_can_fail() -> None:
    """The twin: the global norm is not what a scope gives."""
    params = parameters(torch.full((4,), 3.0), torch.full((4,), 4.0))
    norms = fusedclip.Clipper(params, math.inf, scope="parameter").clip_()
    with pytest.raises(AssertionError):
        assert_norm(norms[0], exact_norm([p.grad for p in params]))


BAD = {
    "scope": ({"scope": "layer"}, "scope: expected one of .*got 'layer'"),
    "policy": ({"nonfinite": "ignore"}, "nonfinite: expected one of .*got 'ignore'"),
    "threshold": ({"max_norm": -1.0}, "max_norm: expected a threshold >= 0"),
    "skip_above": ({"skip_above": math.nan}, "skip_above: expected a threshold >= 0, got nan"),
    "backend": ({"backend": "cudnn"}, "backend: expected one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fusedclip.Clipper([], **{"max_norm": 1.0, **change})


def test_groups_need_an_optimizer() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r'scope="group": expected an Optimizer.*got a module'):
        fusedclip.Clipper(model, 1.0, scope="group").clip_()


def test_a_bad_threshold_of_a_group_is_named_before_anything_is_touched() -> None:
    params = _mixed(6)
    before = clones(params)
    clipper = fusedclip.Clipper(_groups(params, max_norm=-2.0), 1.0, scope="group")
    with pytest.raises(ValueError, match=r"param_groups\[0\]: max_norm: .*-2.0"):
        clipper.clip_()
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))


class _Halves:
    """A policy of the simplest kind: half of the last norm."""

    def __init__(self) -> None:
        self.last = torch.tensor(math.inf, dtype=torch.float64)

    def threshold(self, norm: Tensor) -> Tensor:
        limit, self.last = self.last / 2, norm.double()
        return limit

    def state_dict(self) -> dict[str, Tensor]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.last = state["last"]


def test_a_policy_sees_each_norm_and_sets_each_threshold(backend: str) -> None:
    (p,) = parameters(torch.full((4,), 1.0))
    clipper = fusedclip.Clipper([p], _Halves(), backend=backend)
    assert clipper.clip_() == 2.0  # no threshold yet
    assert (p.grad == 1.0).all()
    assert clipper.clip_() == 2.0  # the threshold is 1
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))
    resumed = fusedclip.Clipper([p], _Halves(), backend=backend)
    resumed.load_state_dict(clipper.state_dict())
    assert resumed.max_norm.last == 2.0


def test_state_of_another_kind_of_threshold_is_refused() -> None:
    fixed, adaptive = fusedclip.Clipper([], 1.0), fusedclip.Clipper([], _Halves())
    with pytest.raises(ValueError, match="it is of a Clipper with a policy"):
        fixed.load_state_dict(adaptive.state_dict())
    with pytest.raises(ValueError, match="it is of a Clipper with a fixed threshold"):
        adaptive.load_state_dict(fixed.state_dict())
    fixed.load_state_dict(fixed.state_dict())


def test_a_module_is_asked_anew_at_each_call() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    clipper = fusedclip.Clipper(model, math.inf)
    model.append(nn.Linear(2, 2, bias=False))
    model(torch.ones(1, 2)).sum().backward()
    assert_norm(clipper.clip_(), exact_norm([p.grad for p in model.parameters()]))
    assert clipper.last_norm is not None
    generator = fusedclip.Clipper(model.parameters(), math.inf)
    assert generator.clip_() == generator.clip_() > 0


def test_skip_needs_an_optimizer() -> None:
    with pytest.raises(RuntimeError, match=r"attach\(optimizer\)"):
        fusedclip.Clipper([], 1.0, nonfinite="skip").clip_()


@pytest.mark.parametrize("name", ["AutoClip", "ZClip"])
def test_a_resumed_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    def make() -> fusedclip.Clipper:
        policy = (
            fusedclip.AutoClip(50, window=8) if name == "AutoClip" else fusedclip.ZClip(warmup=3)
        )
        return fusedclip.Clipper(params, policy)

    def run(clipper: fusedclip.Clipper, steps: range) -> list[Tensor]:
        results = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            spike = 30.0 if step % 7 == 6 else 1.0
            for p in params:
                p.grad = spike * torch.randn(50, generator=generator)
            results += [clipper.clip_(), *(p.grad for p in params)]
        return results

    params = parameters(torch.zeros(50), torch.zeros(50))
    whole = run(make(), range(20))
    first = make()
    run(first, range(9))
    torch.save(first.state_dict(), tmp_path / "clipper.pt")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "clipper.pt"))
    resumed = run(second, range(9, 20))
    assert all(same_bits(a, b) for a, b in zip(resumed, whole[-len(resumed) :], strict=True))
    with pytest.raises(AssertionError):  # the twin: without the history it goes elsewhere
        fresh = run(make(), range(9, 20))
        assert all(same_bits(a, b) for a, b in zip(fresh, whole[-len(fresh) :], strict=True))
