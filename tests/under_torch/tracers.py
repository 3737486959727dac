"""What records a clip to run it later: tracers, exporters and compilers.

All record with the example gradients; what they made is then called with others.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_function
from torch.fx.experimental.proxy_tensor import make_fx

from tests.under_torch.contexts import Call, Context
from tests.under_torch.steps import Graphs, Step, held


def traced_by_make_fx(mode: str) -> Context:
    return lambda step, example: make_fx(step, tracing_mode=mode)(*example)


def traced_by_jit(step: Step, example: list[Tensor]) -> Call:
    return torch.jit.trace(lambda *grads: step(*grads), tuple(example), check_trace=False)


def traced_symbolically(step: Step, example: list[Tensor]) -> Call:
    class Clipping(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Any:
            return step(first, second)

    return torch.fx.symbolic_trace(Clipping())


def aot(step: Step, example: list[Tensor]) -> Call:
    """AOTAutograd on its own: functionalized and traced with fake tensors."""
    return aot_function(step, lambda graph, inputs: graph)


def exported(*, strict: bool) -> Context:
    class Clipping(nn.Module):
        def __init__(self, step: Step) -> None:
            super().__init__()
            self.step = step

        def forward(self, *grads: Tensor) -> Any:
            return self.step(*grads)

    def context(step: Step, example: list[Tensor]) -> Call:
        program = torch.export.export(Clipping(step), tuple(example), strict=strict)
        return program.module()

    return context


def compiled(backend: str, *, dynamic: bool = False, fullgraph: bool = True) -> Context:
    """The last result is the number of graphs that the compiler made, of two shapes if dynamic."""

    def context(step: Step, example: list[Tensor]) -> Call:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        call = torch.compile(
            lambda *parameters: step.on_parameters(*parameters),
            backend=counter, dynamic=dynamic, fullgraph=fullgraph,
        )  # fmt: skip
        if dynamic:
            call(*[held(torch.cat([grad, grad])) for grad in example])

        def count(*grads: Tensor) -> Sequence[Any]:
            results = call(*[held(grad) for grad in grads])
            return *results, Graphs(counter.frame_count)

        return count

    return context


def compiled_with_holders(step: Step, example: list[Tensor]) -> Call:
    """Gradients are set to ``.grad`` inside of the graph."""
    torch._dynamo.reset()
    return torch.compile(lambda *grads: step(*grads), backend="aot_eager", fullgraph=True)


def compiled_around(step: Step, example: list[Tensor]) -> Call:
    """A clip that the compiler is told to leave alone."""
    torch._dynamo.reset()
    apart = torch.compiler.disable(step.on_parameters)

    @torch.compile(backend="eager")
    def call(*grads: Tensor) -> Any:
        return apart(*[held(grad + 0.0) for grad in grads])

    return call


def compiled_with_backward(step: Step, example: list[Tensor]) -> Call:
    """Forward, backward and clip in one compiled function: the compiler breaks at backward."""
    torch._dynamo.reset()
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)

    @torch.compile(backend="aot_eager")
    def train(x: Tensor) -> Any:
        layer.zero_grad()
        layer(x).sum().backward()
        return step.on_parameters(layer.weight)

    return lambda *grads: train(grads[0])


def compiled_autograd_hook(step: Step, example: list[Tensor]) -> Call:
    """Clipped in a hook, while the compiler records the whole backward pass."""
    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, backend="eager")

    def call(*grads: Tensor) -> Sequence[Any]:
        leaves = [torch.zeros_like(grad).requires_grad_() for grad in grads]
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(lambda leaf: step.run([leaf]) and None)
        with compiled_autograd._enable(compiler):
            torch.autograd.backward([leaf * 1.0 for leaf in leaves], grads)
        return [leaf.grad for leaf in leaves]

    return call


TRACERS: dict[str, Context] = {
    "make_fx real": traced_by_make_fx("real"),
    "make_fx fake": traced_by_make_fx("fake"),
    "make_fx symbolic": traced_by_make_fx("symbolic"),
    "jit.trace": traced_by_jit,
    "fx.symbolic_trace": traced_symbolically,
    "AOTAutograd": aot,
    "export strict": exported(strict=True),
    "export": exported(strict=False),
}
COMPILERS: dict[str, Context] = {
    "compile eager": compiled("eager"),
    "compile eager dynamic": compiled("eager", dynamic=True),
    "compile eager, graphs may break": compiled("eager", fullgraph=False),
    "compile aot_eager": compiled("aot_eager"),
    "compile aot_eager dynamic": compiled("aot_eager", dynamic=True),
    "compile, gradients set inside": compiled_with_holders,
    "compile, disabled": compiled_around,
    "compile, with backward": compiled_with_backward,
    "compiled autograd": compiled_autograd_hook,
}
INDUCTOR: dict[str, Context] = {"compile inductor": compiled("inductor")}
