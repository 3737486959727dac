"""``twice``: the same training with torch's clip and with fusedclip's, and what must hold."""

import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fusedclip
from fusedclip.backends import cpu, plain, reference

# torch sums a tensor's squares in fp32 in an order of its own: a few units in the 7th digit, which
# later steps carry on as slightly different parameters.
NORM_RTOL = 1e-5
# After k SGD steps: the coefficients' relative difference (NORM_RTOL) times what was moved.
PARAMETER_RTOL = 1e-5
PARAMETER_ATOL = 1e-6
# Adam divides a gradient by its own size: where it is next to 0 (a key's bias, by symmetry), its
# rounding noise becomes a part of a step. Times the learning rate, the largest step there is.
ADAM_ATOL_OF_LR = 1e-2

_TORCH_NAMES = (
    "torch.nn.utils:clip_grad_norm_",
    "torch.nn.utils:get_total_norm",
    "torch.nn.utils:clip_grads_with_norm_",
    "torch.nn.utils:clip_grad_value_",
    "torch.nn.utils.clip_grad:clip_grad_norm_",
    "torch.nn.utils.clip_grad:clip_grad_value_",
)


@dataclass(frozen=True)
class Run:
    """What a training leaves: its reported gradient norm at each step, and the parameters."""

    grad_norms: list[float]
    parameters: dict[str, Tensor]


@dataclass
class Kernels:
    """Calls of fusedclip's kernels, by name, and how many of them changed gradients."""

    calls: list[str] = field(default_factory=list)
    bites: int = 0


@dataclass(frozen=True)
class Comparison:
    torch: Run
    fusedclip: Run
    kernels: Kernels


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the trained parameters, whole if they are sharded."""
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def twice(
    train: Callable[[], Run],
    *,
    max_norm: float,
    patch: Callable[[], AbstractContextManager[Any]] = fusedclip.patch,
    untouched: Sequence[str] = (),
    seed: int = 0,
    norm_rtol: float = NORM_RTOL,
    later_norm_rtol: float | None = None,
    parameter_rtol: float = PARAMETER_RTOL,
    parameter_atol: float = PARAMETER_ATOL,
) -> Comparison:
    """Train from one seed without fusedclip and with it; raise AssertionError where they differ.

    Holds: without it no kernel of fusedclip runs; with it our kernels clip, at some step above the
    threshold; the reported norms agree, and the parameters at the end; every name of torch and of
    ``untouched`` is afterwards the object that it was.

    Args:
        train: makes model, data and optimizer anew and trains; clips at ``max_norm``.
        patch: what switches fusedclip on for the second run; ``nullcontext`` where ``train`` does.
        untouched: functions of the framework, ``"module:Class.function"``.
        later_norm_rtol: after the first step, where forward and backward round to few bits and so
            turn a last-bit difference of a parameter into more; default: ``norm_rtol``.
    """
    names = (*_TORCH_NAMES, *untouched)
    before = {name: _resolve(name) for name in names}
    with counted_kernels() as unused:
        _seed(seed)
        plain = train()
    assert not unused.calls, f"fusedclip clipped in the run without it: {unused.calls}"
    with counted_kernels() as kernels:
        _seed(seed)
        with patch():
            fused = train()
    left = [name for name in names if _resolve(name) is not before[name]]
    assert not left, f"still patched afterwards: {left}"
    comparison = Comparison(plain, fused, kernels)
    compare(
        comparison, max_norm=max_norm, norm_rtol=norm_rtol, later_norm_rtol=later_norm_rtol,
        parameter_rtol=parameter_rtol, parameter_atol=parameter_atol,
    )  # fmt: skip
    return comparison


def compare(
    seen: Comparison,
    *,
    max_norm: float,
    norm_rtol: float = NORM_RTOL,
    later_norm_rtol: float | None = None,
    parameter_rtol: float = PARAMETER_RTOL,
    parameter_atol: float = PARAMETER_ATOL,
) -> None:
    """What must hold of the two runs, whoever ran them; arguments as of ``twice``."""
    plain, fused = seen.torch, seen.fusedclip
    _check_kernels(seen.kernels, plain, max_norm)
    later = norm_rtol if later_norm_rtol is None else later_norm_rtol
    _check_norms(plain.grad_norms, fused.grad_norms, norm_rtol, later)
    assert plain.parameters.keys() == fused.parameters.keys()
    assert plain.parameters, "the training returned no parameter"
    for name, expected in plain.parameters.items():
        torch.testing.assert_close(
            fused.parameters[name], expected, rtol=parameter_rtol, atol=parameter_atol,
            msg=lambda text, name=name: f"parameter {name!r} after training: {text}",
        )  # fmt: skip


@contextmanager
def counted_kernels() -> Iterator[Kernels]:
    """Count the calls that reach the kernels of the backends that can serve the CPU."""
    kernels = Kernels()
    modules = {"cpu": cpu, "reference": reference}
    entries = [
        (module, name, getattr(module, name), f"{backend}.{name}")
        for backend, module in modules.items()
        for name in ("clip_", "measure", "scale_")
    ]
    native = plain.clip_
    for module, name, entry, label in entries:
        setattr(module, name, _counting(entry, label, kernels))
    plain.clip_ = _counting_plain(native, kernels)
    try:
        yield kernels
    finally:
        for module, name, entry, _ in entries:
            setattr(module, name, entry)
        plain.clip_ = native


def _counting(entry: Callable[..., Any], label: str, kernels: Kernels) -> Callable[..., Any]:
    kind = label.partition(".")[2]

    def call(grads: Any, *arguments: Any, **options: Any) -> Any:
        result = entry(grads, *arguments, **options)
        if kind == "clip_" and result is None:  # left to the other functions
            return result
        kernels.calls.append(label)
        if kind == "clip_":
            kernels.bites += bool((result > arguments[0]).any())
        elif kind == "scale_":
            kernels.bites += bool((arguments[1] < 1).any())
        return result

    return call


def _counting_plain(entry: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """The same kernel, called by the native function that does all of it."""

    def call(clip: Callable[..., Any], tensors: Any) -> Any:
        def counted(tensors: Any) -> Any:
            done = clip(tensors)
            if done is not None:
                kernels.calls.append("cpu.clip_")
                kernels.bites += isinstance(done, tuple)
            return done

        return entry(counted, tensors)

    return call


def _check_kernels(kernels: Kernels, plain: Run, max_norm: float) -> None:
    steps = len(plain.grad_norms)
    assert steps, "the training reported no gradient norm"
    assert len(kernels.calls) >= steps, (
        f"fusedclip's kernels ran {len(kernels.calls)} times in {steps} steps"
    )
    above = sum(norm > max_norm for norm in plain.grad_norms)
    assert above, f"no step was above {max_norm}: {plain.grad_norms}; nothing was tested"
    assert kernels.bites >= above, (
        f"{above} steps were above the threshold, {kernels.bites} clipped"
    )


def _check_norms(
    expected: list[float], actual: list[float], first_rtol: float, later_rtol: float
) -> None:
    assert len(actual) == len(expected)
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert math.isclose(ours, theirs, rel_tol=later_rtol if step else first_rtol), (
            f"grad_norm of step {step}: torch {theirs}, fusedclip {ours}"
        )


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = vars(value)[part] if part in vars(value) else getattr(value, part)
    return value


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
