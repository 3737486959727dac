"""When native code may take the gradients' memory, and what is done where it may not."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fusedclip
from fusedclip import ambient
from fusedclip.backends import native, plain
from tests import forked
from tests.helpers import parameters
from tests.under_torch.contexts import DispatchWatcher, FunctionWatcher

ACTIVE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": DispatchWatcher,
    "function mode": FunctionWatcher,
    "dual numbers": forward_ad.dual_level,
}
HARMLESS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_native_code_is_not_allowed(name: str) -> None:
    with ACTIVE[name]():
        assert not ambient.native_allowed()
        with torch.device("cpu"):
            assert not ambient.native_allowed()
    assert ambient.native_allowed()


@pytest.mark.parametrize("name", HARMLESS)
def test_native_code_is_allowed(name: str) -> None:
    with HARMLESS[name]():
        assert ambient.native_allowed()


def test_transforms_and_tracers_are_noticed() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(ambient.native_allowed())
        return x * 2

    x = torch.ones(2)
    torch.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.functionalize(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    make_fx(look)(x)
    assert seen == [False] * 5
    look(x)
    assert seen[-1]


@pytest.mark.skipif(native.module is None, reason="needs the native module")
class TestThePlainClip:
    """The native function that asks by itself. Every mode would pass the other tests if nothing ran
    natively at all."""

    @pytest.mark.parametrize("name", sorted(HARMLESS.keys() - {"inference_mode"}))
    def test_it_runs_where_it_may(self, name: str) -> None:
        params = parameters(torch.tensor([3.0, 4.0]))
        with HARMLESS[name]():
            assert _plainly(params) == 5.0

    @pytest.mark.parametrize("name", ACTIVE)
    def test_it_does_nothing_where_it_may_not(self, name: str) -> None:
        params = parameters(torch.tensor([3.0, 4.0]))
        with ACTIVE[name](), torch.device("cpu"):
            assert _plainly(params) is None
        assert params[0].grad.equal(torch.tensor([3.0, 4.0]))

    def test_it_does_nothing_in_a_trace(self) -> None:
        seen: list[Tensor | None] = []
        params = parameters(torch.tensor([3.0, 4.0]))

        def look(x: Tensor) -> Tensor:
            seen.append(_plainly(params))
            return x * 2

        torch.jit.trace(look, torch.ones(2), check_trace=False)
        make_fx(look)(torch.ones(2))
        assert seen == [None, None]

    def test_the_functions_call_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        inner = plain.clip_
        monkeypatch.setattr(plain, "clip_", lambda *a: calls.append(1) or inner(*a))
        params = parameters(torch.tensor([3.0, 4.0]))
        fusedclip.clip_(params, 1.0)
        fusedclip.clip_grad_norm_(params, 1.0)
        fusedclip.get_total_norm([p.grad for p in params])
        fusedclip.Clipper(params, 1.0).clip_()
        assert len(calls) == 4

    def test_its_norms_are_tensors_of_their_own(self) -> None:
        """They are made some at a time, before they are asked for."""
        norms = [_plainly(parameters(torch.tensor([float(i)]))) for i in range(100)]
        assert [float(norm) for norm in norms] == list(range(100))
        assert len({norm.data_ptr() for norm in norms}) == 100
        norms[0].add_(1)
        assert [int(norms[0]), int(norms[1])] == [1, 1] and norms[1]._version == 0

    def test_its_errors_are_those_of_the_binding(self) -> None:
        """It is called without pybind11's dispatcher, which would translate them."""
        script = """
import torch, fusedclip
p = torch.nn.Parameter(torch.zeros(2))
p.grad = torch.ones(2)
try:
    fusedclip.clip_([p], 1.0)
except ValueError as error:
    assert "FUSEDCLIP_CPU_ISA" in str(error), error
else:
    raise AssertionError("no error")
"""
        environment = {**os.environ, "FUSEDCLIP_CPU_ISA": "abacus"}
        run = forked.python("-W", "ignore", "-c", script, env=environment)
        assert run.returncode == 0, run.stderr

    def test_it_leaves_inference_mode_to_the_pipeline(self) -> None:
        """Norms are inference tensors there, and must not be elsewhere."""
        params = parameters(torch.tensor([3.0, 4.0]))
        with torch.inference_mode():
            assert _plainly(params) is None
            assert fusedclip.clip_(params, 9.0).is_inference()
        assert not any(fusedclip.clip_(params, 9.0).is_inference() for _ in range(100))


def _plainly(params: list[nn.Parameter]) -> Tensor | None:
    clip = plain.prepared(
        1e9, from_parameters=True, infinity=False, nonfinite="propagate", backend="auto"
    )
    return plain.clip_(clip, params)


def _two(scale: float = 1.0) -> list[Tensor]:
    return [torch.tensor([3.0, 4.0]) * scale, torch.tensor([0.0, 12.0]) * scale]


# What the strict function offers beyond torch's, where torch's operations do the work.
@pytest.mark.parametrize("limit", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_the_strict_clip_in_a_trace(limit: float | Tensor) -> None:
    def clip(*grads: Tensor) -> tuple[Tensor, ...]:
        params = [torch.zeros_like(grad) for grad in grads]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        return fusedclip.clip_(params, limit), *grads

    traced = make_fx(clip)(*_two(0.001))
    norm, first, second = traced(*_two())
    assert norm == 13.0
    torch.testing.assert_close(first, torch.tensor([3.0, 4.0]) / 13)
    torch.testing.assert_close(second, torch.tensor([0.0, 12.0]) / 13)


def test_zeroing_in_a_mode() -> None:
    params = parameters(torch.tensor([3.0, math.nan]), torch.ones(2))
    with DispatchWatcher():
        norm = fusedclip.clip_(params, 1.0, nonfinite="zero")
    assert norm.isnan()
    assert not any(p.grad.any() for p in params)


def test_refusing_in_a_mode() -> None:
    params = parameters(torch.ones(2), torch.tensor([3.0, math.inf]))
    with DispatchWatcher(), pytest.raises(fusedclip.NonfiniteGradientError) as error:
        fusedclip.clip_(params, 1.0, nonfinite="error")
    assert [culprit.index for culprit in error.value.culprits] == [1]
    assert params[0].grad.equal(torch.ones(2))


def test_an_infinite_threshold_never_writes_in_a_mode() -> None:
    params = parameters(torch.tensor([3.0, math.inf]))
    with DispatchWatcher():
        assert fusedclip.clip_grad_norm_(params, math.inf).isinf()
    assert params[0].grad[0] == 3.0


def test_large_values_in_a_mode() -> None:
    """Finite gradients have a finite norm here too."""
    params = parameters(torch.tensor([3e20, 4e20]))
    with DispatchWatcher():
        norm = fusedclip.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm, torch.tensor(5e20))


def test_a_subclass_of_two_components_is_no_plain_memory() -> None:
    """The strict function too: each component has a norm of its own."""
    inner = torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0])
    params = parameters(TwoTensor(*inner))
    norm = fusedclip.clip_(params, 10.0)
    assert (norm.a, norm.b) == (5.0, 50.0)
    assert inner[0].equal(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(inner[1], torch.tensor([6.0, 8.0]))


def test_listeners_hear_of_a_clip_in_a_mode() -> None:
    """An attached Clipper does not clip again what a mode has seen clipped."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fusedclip.Clipper(model, 0.5).attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    with DispatchWatcher():
        fusedclip.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="were clipped before"):
        optimizer.step()
