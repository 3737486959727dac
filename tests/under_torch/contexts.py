"""What can be going on around a clip: torch's modes and transforms, and calls by autograd.

A context takes a step and example gradients, and returns what a user would then call with the real
ones. Tracers and compilers are in ``tracers``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses import functional_tensor, schema_check_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch, flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.under_torch.steps import Step

Call = Callable[..., Sequence[Any]]
Context = Callable[[Step, list[Tensor]], Call]


def within(mode: Callable[[], AbstractContextManager[Any]]) -> Context:
    def context(step: Step, example: list[Tensor]) -> Call:
        def call(*grads: Tensor) -> Sequence[Any]:
            with mode():
                return step(*grads)

        return call

    return context


class _Watcher:
    """Of a mode: which tensors it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[int] = set()

    def watch(self, arguments: Any) -> None:
        self.shown |= {id(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}


class DispatchWatcher(_Watcher, TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch((args, kwargs))
        return func(*args, **(kwargs or {}))


class FunctionWatcher(_Watcher, TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch((args, kwargs))
        return func(*args, **(kwargs or {}))


def watched(watcher: Callable[[], Any]) -> Context:
    """The last result says whether the mode was shown every gradient: what it counts or logs."""

    def context(step: Step, example: list[Tensor]) -> Call:
        def call(*grads: Tensor) -> Sequence[Any]:
            parameters = [step.hold(grad) for grad in grads]
            with watcher() as mode:
                results = step.on_parameters(*parameters)
            return *results, {id(p.grad) for p in parameters} <= mode.shown

        return call

    return context


def fake(*, inside: bool) -> Context:
    """Fake gradients, while their mode is active or after it."""

    def context(step: Step, example: list[Tensor]) -> Call:
        def call(*grads: Tensor) -> Sequence[Any]:
            mode = FakeTensorMode()
            fakes = [mode.from_tensor(grad) for grad in grads]
            with mode if inside else contextlib.nullcontext():
                return step(*fakes)

        return call

    return context


def fake_weights(step: Step, example: list[Tensor]) -> Call:
    """Real gradients under a fake mode that lets them in, as ``torch.distributed`` tools do."""

    def call(*grads: Tensor) -> Sequence[Any]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return step(*grads)

    return call


def functional_tensors(step: Step, example: list[Tensor]) -> Call:
    """What AOTAutograd traces with."""

    def call(*grads: Tensor) -> Sequence[Any]:
        with functional_tensor.FunctionalTensorMode():
            wrapped = [functional_tensor.FunctionalTensor.to_functional(grad) for grad in grads]
            results = step(*wrapped)
        return [torch._from_functional_tensor(result.elem) for result in results]

    return call


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


@contextlib.contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def grad_of(step: Step, example: list[Tensor]) -> Call:
    """torch.func.grad through a norm: the first result is differentiated, the step is all."""

    def loss(*grads: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        results = step(*[grad * 1.0 for grad in grads])
        return sum((result * result.detach()).sum() for result in results) + grads[0].sum(), results

    return lambda *grads: _flat(torch.func.grad(loss, argnums=(0, 1), has_aux=True)(*grads))


def nested_grad(step: Step, example: list[Tensor]) -> Call:
    """Clipping an inner gradient inside of an outer one, as in meta-learning."""

    def inner(weight: Tensor) -> Tensor:
        return (weight**3).sum()

    def outer(first: Tensor, second: Tensor) -> Tensor:
        clipped = step(torch.func.grad(inner)(first), torch.func.grad(inner)(second))
        return (first * clipped[-2]).sum()

    return lambda *grads: _flat(torch.func.grad(outer, argnums=(0, 1))(*grads))


def vjp(step: Step, example: list[Tensor]) -> Call:
    def call(*grads: Tensor) -> Sequence[Any]:
        results, pull = torch.func.vjp(lambda *g: step(*[x * 1.0 for x in g]), *grads)
        return _flat((results, pull(tuple(torch.ones_like(result) for result in results))))

    return call


def jvp(step: Step, example: list[Tensor]) -> Call:
    return lambda *grads: _flat(
        torch.func.jvp(lambda *g: step(*[x * 1.0 for x in g]), grads, grads)
    )


def jacobian(kind: Callable[..., Any]) -> Context:
    def context(step: Step, example: list[Tensor]) -> Call:
        return lambda *grads: _flat(kind(lambda *g: step(*[x * 1.0 for x in g]))(*grads))

    return context


def vmap(step: Step, example: list[Tensor]) -> Call:
    """One clip for each sample, as DP-SGD does it."""

    def call(*grads: Tensor) -> Sequence[Any]:
        return torch.vmap(step)(*[torch.stack([grad, 2 * grad, grad / 100]) for grad in grads])

    return call


def vmap_of_grad(step: Step, example: list[Tensor]) -> Call:
    """The gradients of each sample, clipped by their own norm."""

    def of_sample(sample: Tensor, *weights: Tensor) -> Sequence[Any]:
        def loss(*w: Tensor) -> Tensor:
            return sum((x * x).sum() for x in w) * sample

        return step(*torch.func.grad(loss, argnums=(0, 1))(*weights))

    samples = torch.tensor([0.01, 1.0, 3.0])
    in_dims = (0, None, None)
    return lambda *grads: torch.vmap(of_sample, in_dims=in_dims)(samples, *grads)


def functional_call(step: Step, example: list[Tensor]) -> Call:
    class Clipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.zeros_like(grad) for grad in example])

        def forward(self) -> tuple[Any, ...]:
            return step(*[weight * 1.0 for weight in self.weights])

    module = Clipping()

    def call(*grads: Tensor) -> Sequence[Any]:
        given = {f"weights.{i}": grad for i, grad in enumerate(grads)}
        return torch.func.functional_call(module, given, ())

    return call


def dual_numbers(step: Step, example: list[Tensor]) -> Call:
    """Gradients that carry a tangent."""

    def call(*grads: Tensor) -> Sequence[Any]:
        with forward_ad.dual_level():
            results = step(*[forward_ad.make_dual(grad, grad.clone()) for grad in grads])
            return _flat([tuple(forward_ad.unpack_dual(result)) for result in results])

    return call


def checkpointed(*, reentrant: bool) -> Context:
    """Clipped in the forward pass, and again when backward repeats it."""

    def context(step: Step, example: list[Tensor]) -> Call:
        def call(*grads: Tensor) -> Sequence[Any]:
            seen: list[Any] = []

            def forward(x: Tensor) -> Tensor:
                seen.extend(step(*[grad.clone() for grad in grads]))
                return (x * x * seen[-1].sum()).sin()

            x = torch.ones(2, requires_grad=True)
            checkpoint = torch.utils.checkpoint.checkpoint
            checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
            return *seen, x.grad

        return call

    return context


def autograd_function(step: Step, example: list[Tensor]) -> Call:
    """Clipped in the backward of a user's function."""

    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.clone() for value in values)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            return step(*[grad.clone() for grad in grads])[-len(grads) :]

    return _backward(lambda leaves: Clip.apply(*leaves))


def gradient_hook(step: Step, example: list[Tensor]) -> Call:
    """Clipped in a hook of a tensor, one gradient after the other."""

    def hooked(leaves: list[Tensor]) -> list[Tensor]:
        for leaf in leaves:
            leaf.register_hook(lambda grad: step(grad.clone())[-1])
        return [leaf * 1.0 for leaf in leaves]

    return _backward(hooked)


def accumulated_hook(step: Step, example: list[Tensor]) -> Call:
    """Clipped as soon as a gradient is there: the optimizer-in-backward way."""

    def hooked(leaves: list[Tensor]) -> list[Tensor]:
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(lambda leaf: step.run([leaf]) and None)
        return [leaf * 1.0 for leaf in leaves]

    return _backward(hooked)


def _backward(function: Callable[[list[Tensor]], Sequence[Tensor]]) -> Call:
    """The gradients that arrive at leaves when ``grads`` are those of what is made of them."""

    def call(*grads: Tensor) -> Sequence[Any]:
        leaves = [torch.zeros_like(grad).requires_grad_() for grad in grads]
        torch.autograd.backward(function(leaves), grads)
        return [leaf.grad for leaf in leaves]

    return call


def saved_for_backward(
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Context:
    """Backward needs a gradient that was clipped since: autograd notices, or keeps the old one."""

    def context(step: Step, example: list[Tensor]) -> Call:
        def call(*grads: Tensor) -> Sequence[Any]:
            weight = torch.ones_like(grads[0]).requires_grad_()
            with around():
                loss = (weight * grads[0]).sum()
                results = step(*grads)
                loss.backward()
            return *results, weight.grad

        return call

    return context


def parametrized(step: Step, example: list[Tensor]) -> Call:
    """The parameters are those that the weight is computed from."""

    def call(*grads: Tensor) -> Sequence[Any]:
        layer = nn.Linear(2, 2, bias=False)
        nn.init.eye_(layer.weight)
        nn.utils.parametrizations.weight_norm(layer)
        (layer(grads[0]) * grads[1]).sum().backward()
        return step.on_parameters(*layer.parameters())

    return call


def _flat(results: Any) -> list[Any]:
    return list(tree_leaves(results))


def plain(step: Step, example: list[Tensor]) -> Call:
    return step


MODES: dict[str, Context] = {
    "no_grad": within(torch.no_grad),
    "enable_grad": within(torch.enable_grad),
    "inference_mode": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "detect_anomaly": within(lambda: torch.autograd.detect_anomaly(check_nan=True)),
    "saved tensors on cpu": within(torch.autograd.graph.save_on_cpu),
    "deterministic": within(_deterministic),
    "default dtype float64": within(lambda: _default_dtype(torch.float64)),
    "default dtype bfloat16": within(lambda: _default_dtype(torch.bfloat16)),
    "default device meta": within(lambda: _default_device("meta")),
    "with device meta": within(lambda: torch.device("meta")),
    "dispatch mode": watched(DispatchWatcher),
    "function mode": watched(FunctionWatcher),
    "flop counter": within(lambda: flop_counter.FlopCounterMode(display=False)),
    "schema check": within(schema_check_mode.SchemaCheckMode),
    "modes disabled": within(_python_dispatch._disable_current_modes),
    "torch function disabled": within(torch._C.DisableTorchFunction),
    "fake, inside": fake(inside=True),
    "fake, outside": fake(inside=False),
    "fake mode, real gradients": fake_weights,
    "functional tensors": functional_tensors,
}
# torch has no rules for its operators of many tensors under these; under their twins it says so.
ONE_BY_ONE = ("func.jvp", "func.jacfwd", "func.vmap", "func.vmap of grad", "forward-mode AD")
TRANSFORMS: dict[str, Context] = {
    "func.grad": grad_of,
    "func.grad, nested": nested_grad,
    "func.vjp": vjp,
    "func.jvp": jvp,
    "func.jvp, foreach": jvp,
    "func.jacrev": jacobian(torch.func.jacrev),
    "func.jacfwd": jacobian(torch.func.jacfwd),
    "func.functionalize": lambda step, example: torch.func.functionalize(step),
    "func.functional_call": functional_call,
    "func.vmap": vmap,
    "func.vmap, foreach": vmap,
    "func.vmap of grad": vmap_of_grad,
    "forward-mode AD": dual_numbers,
    "forward-mode AD, foreach": dual_numbers,
}
AUTOGRAD: dict[str, Context] = {
    "checkpoint": checkpointed(reentrant=False),
    "checkpoint, reentrant": checkpointed(reentrant=True),
    "autograd.Function": autograd_function,
    "hook of a tensor": gradient_hook,
    "hook after accumulation": accumulated_hook,
    "saved for backward": saved_for_backward(),
    "saved for backward, may be written": saved_for_backward(
        torch.autograd.graph.allow_mutation_on_saved_tensors
    ),
    "parametrized": parametrized,
}
