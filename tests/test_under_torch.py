"""A drop-in under all that torch does: what ``fusedclip.patch()`` puts behind torch's names against
torch's own functions, in every mode, transform, tracer and compiler, for every kind of gradient.

A cell is gradients, a context, a function, and whether they are clipped; the tables of each are
in ``tests/under_torch``. In every cell values agree to 1e-6, and types, dtypes, devices, shapes and
the types of exceptions are the same. Where the README says that fusedclip differs from torch, the
cell compares with what it promises.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import _get_current_dispatch_mode

import fusedclip
from tests.distributed.processes import failures, run_job
from tests.under_torch import ranks
from tests.under_torch.contexts import AUTOGRAD, MODES, ONE_BY_ONE, TRANSFORMS, Context, plain
from tests.under_torch.gradients import KINDS, PLAIN, Kind
from tests.under_torch.steps import (
    FUNCTIONS,
    IN_A_ROW,
    MAGNITUDES,
    TORCHS,
    Meant,
    Raised,
    Step,
    difference,
    outcome,
)
from tests.under_torch.tracers import COMPILERS, INDUCTOR, TRACERS

CONTEXTS: dict[str, Context] = {
    "eager": plain, **MODES, **TRANSFORMS, **AUTOGRAD, **TRACERS, **COMPILERS, **INDUCTOR
}  # fmt: skip
GRADIENTS: dict[str, Kind] = {"plain": PLAIN, **KINDS}

# Where what is special about the gradients may meet what is special about the context.
_CROSSED = (
    (("bfloat16", "float32, float64", "one twice", "carries graph", "inference", "expanded",
      "two components"),
     ("inference_mode", "dispatch mode", "fake, outside", "make_fx real")),
    # Of a gradient that is listed twice vmap makes two.
    (("bfloat16", "float32, float64", "carries graph", "inference", "expanded", "two components"),
     ("func.vmap",)),
    (("bfloat16", "float32, float64", "two components"), ("compile aot_eager",)),
    (("DTensor 1-D",), ("inference_mode", "dispatch mode", "default device meta",
                        "compile aot_eager")),
)  # fmt: skip

# Rows of the README's table of differences that other tests show.
_SHOWN_ELSEWHERE = {
    "below the threshold": "test_semantics.py",
    "finite gradients of 1e20, 1e-30": "test_accuracy.py",
    "AMP: a norm beyond the range of fp32 though every gradient is finite": "test_amp.py",
    "AMP: which gradients an overflow leaves clipped": "test_amp.py",
    "`max_norm=inf` with an infinite norm": "test_semantics.py",
    "reproducibility": "test_reproducibility.py",
}

_NAMES = [
    (module, name)
    for module in (torch.nn.utils, clip_grad)
    for function in TORCHS
    for name in (function, f"_{function}")
    if hasattr(module, name)
]


def _cells() -> Iterator[tuple[str, str, str]]:
    pairs = [("plain", context) for context in CONTEXTS]
    pairs += [(kind, "eager") for kind in KINDS]
    for kinds, contexts in _CROSSED:
        pairs += [(kind, context) for kind in kinds for context in contexts]
    for kind, context in pairs:
        # Seconds each: two functions stand for all.
        slow = context in (*INDUCTOR, "compile, with backward", "compiled autograd")
        functions = ("clip_grad_norm_", IN_A_ROW) if slow else FUNCTIONS
        for function in functions:
            yield kind, context, function


CELLS = list(_cells())


@functools.cache
def _patched_names() -> list[Any]:
    """What ``patch()`` puts behind each name; it searches all modules, which takes a while."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fusedclip.patch():
            return [getattr(module, name) for module, name in _NAMES]


@contextlib.contextmanager
def installed(*functions: Any) -> Iterator[None]:
    """Each behind its name of ``_NAMES``."""
    with pytest.MonkeyPatch.context() as patched:
        for (module, name), function in zip(_NAMES, functions, strict=True):
            patched.setattr(module, name, function)
        yield


def _outcomes(
    kind: Kind, context: Context, step: Callable[..., Any], names: AbstractContextManager[Any]
) -> dict[str, Any]:
    """What comes of the step in the context: recorded once where that records, then called."""
    with kind.around(), names, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: list[Any] = []
        problem = outcome(lambda: made.append(context(step, kind.make(0.02))) or [])
        if isinstance(problem, Raised):
            return dict.fromkeys(MAGNITUDES, problem)
        return {
            magnitude: outcome(lambda scale=scale: made[0](*kind.make(scale)))
            for magnitude, scale in MAGNITUDES.items()
        }


@functools.cache
def _torchs(kind: str, context: str, function: str, meant: bool) -> dict[str, Any]:
    described = GRADIENTS[kind]
    step = _step(described, context, function)
    call = Meant(step, described.meant(step)) if meant and described.differs else step
    return _outcomes(described, CONTEXTS[context], call, contextlib.nullcontext())


def _step(kind: Kind, context: str, function: str) -> Step:
    foreach = False if context in ONE_BY_ONE else kind.foreach
    return Step(function, kind.norm_type, foreach, kind.early, kind.holder, kind.readable)


def problems(kind: str, context: str, function: str, names: list[Any]) -> dict[str, str]:
    """How the functions behind torch's names differ from what they should be, by magnitude."""
    described = GRADIENTS[kind]
    torchs = _torchs(kind, context, function, True)
    step = _step(described, context, function)
    ours = _outcomes(described, CONTEXTS[context], step, installed(*names))
    return {magnitude: difference(ours[magnitude], torchs[magnitude]) for magnitude in MAGNITUDES}


@functools.cache
def _problems_of_ours(kind: str, context: str, function: str) -> dict[str, str]:
    return problems(kind, context, function, _patched_names())


@pytest.mark.parametrize(
    ("kind", "context", "function", "magnitude"),
    [
        pytest.param(*cell, magnitude, id="-".join((*cell, magnitude)))
        for cell in CELLS
        for magnitude in MAGNITUDES
        # Below the threshold fusedclip writes nothing, so autograd has nothing to notice.
        if not (cell[1].startswith("saved for backward") and magnitude == "not clipped")
    ],
)
def test_cell(kind: str, context: str, function: str, magnitude: str) -> None:
    problem = _problems_of_ours(kind, context, function)[magnitude]
    assert not problem, problem


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[str]]:
    return run_job("tests.under_torch.ranks", 2)


@pytest.mark.parametrize("name", ranks.CASES[2])
def test_two_ranks(two_ranks: dict[str, list[str]], name: str) -> None:
    problem = failures(two_ranks.get(name, ["no rank ran it"]))
    assert not problem, problem


def test_the_readme_names_what_differs() -> None:
    section = (Path(__file__).parents[1] / "README.md").read_text().split("## How it differs")[1]
    lines = section.split("\n## ")[0].splitlines()
    rows = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")}
    shown = {kind.differs for kind in KINDS.values()} - {None}
    assert rows - {"|"} == shown | set(_SHOWN_ELSEWHERE)


@pytest.mark.parametrize("row", sorted({kind.differs for kind in KINDS.values()} - {None}))
def test_what_differs_on_purpose_does(row: str) -> None:
    """No row of the README that has become untrue: torch's own outcome is another one."""
    assert any(
        difference(
            _torchs(name, "eager", function, True)["clipped"],
            _torchs(name, "eager", function, False)["clipped"],
        )
        for name, kind in KINDS.items()
        for function in FUNCTIONS
        if kind.differs == row
    )


def _bypassing(when: Callable[[], bool]) -> list[Any]:
    """torch's functions, but ``clip_grad_norm_`` only measures ``when``: a planted bypass."""

    def clip(parameters: Any, max_norm: float, norm_type: float = 2.0, **options: Any) -> Any:
        if when():
            grads = [p.grad.detach() for p in parameters]
            return TORCHS["get_total_norm"](grads, norm_type, **options)
        return TORCHS["clip_grad_norm_"](parameters, max_norm, norm_type, **options)

    return [clip if name == "clip_grad_norm_" else getattr(module, name) for module, name in _NAMES]


# Where a bypass is planted → a cell that must notice it, and one that cannot.
PLANTED: dict[str, tuple[Callable[[], bool], str, str]] = {
    "dispatch mode": (
        lambda: _get_current_dispatch_mode() is not None, "dispatch mode", "function mode"
    ),
    "function mode": (
        lambda: torch._C._len_torch_function_stack() > 0, "function mode", "dispatch mode"
    ),
    "make_fx": (
        lambda: _get_current_dispatch_mode() is not None, "make_fx real", "jit.trace"
    ),
    "jit.trace": (torch.jit.is_tracing, "jit.trace", "make_fx real"),
    "transform": (
        lambda: torch._C._functorch.maybe_current_level() is not None, "func.vmap", "eager"
    ),
    "dynamo": (torch.compiler.is_dynamo_compiling, "compile eager", "eager"),
    "export": (torch.compiler.is_exporting, "export", "jit.trace"),
    "inference_mode": (torch.is_inference_mode_enabled, "inference_mode", "no_grad"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_bypass_is_caught(planted: str) -> None:
    """The twin: a function that returns without clipping in one context fails there alone."""
    when, caught, unharmed = PLANTED[planted]
    names = _bypassing(when)
    assert problems("plain", caught, "clip_grad_norm_", names)["clipped"]
    assert not any(problems("plain", unharmed, "clip_grad_norm_", names).values())


def test_another_type_of_result_is_caught() -> None:
    """The twin: a norm that is a plain tensor where torch's is of the gradients' type."""

    def plain_norm(*arguments: Any, **options: Any) -> Any:
        return TORCHS["get_total_norm"](*arguments, **options).a

    names = [
        plain_norm if name in ("get_total_norm", "_get_total_norm") else getattr(module, name)
        for module, name in _NAMES
    ]
    assert "TwoTensor" in problems("two components", "eager", "get_total_norm", names)["clipped"]
