"""The common clip as one native call: dense gradients of plain tensors, all on one device.

It gathers, measures, decides and scales. Other lists of gradients are recognised before anything
is written, and the pipeline clips them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from fusedclip.backends import cpu, cuda, native, triton

if TYPE_CHECKING:
    from fusedclip._C import TritonGradients

# Of a list: the norm, or the norm and what was written, or None.
PlainClip: TypeAlias = Callable[[Sequence[Tensor]], Tensor | tuple[Tensor, list[Tensor]] | None]

_BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton}  # as users name them


def problem(backend: str) -> str:
    """Why there is no native function for this backend; empty where there is one."""
    if backend not in ("auto", *_BACKENDS):
        return "it has no native module"
    return cpu.problem() or ("" if backend == "auto" else str(_BACKENDS[backend].problem()))


def prepared(
    max_norm: float, *, from_parameters: bool, infinity: bool, nonfinite: str, backend: str
) -> PlainClip:
    """The native function of these settings, for ``clip_``.

    It asks itself what ``ambient.plain_allowed`` and ``select.resolve`` would answer: on cold
    caches that much Python takes as long as the clip.
    """
    auto = backend == "auto"
    return native.module.plain_clip(
        max_norm,
        infinity,
        native.NONFINITE[nonfinite],
        from_parameters,
        auto or backend == "cpu",
        None if auto else functools.partial(problem, backend),
        cuda.usable_devices if auto or backend == "cuda" else _none,
        cuda.plain_memory,
        _usable_by_triton if auto else triton.served_devices if backend == "triton" else _none,
        functools.partial(_clip_by_triton, max_norm, infinity, nonfinite),
    )


def _none() -> int:
    return 0


def _clip_by_triton(
    max_norm: float, infinity: bool, nonfinite: str, grads: "TritonGradients"
) -> Tensor:
    norm = triton.clip_(grads, max_norm, infinity=infinity, nonfinite=nonfinite)
    assert norm is not None  # which it is for segments alone
    return norm


def _usable_by_triton() -> int:
    return triton.served_devices() if triton.usable() else 0


def clip_(clip: PlainClip, tensors: Sequence[Tensor]) -> Tensor | None:
    """The norm before clipping, 0-dim on the gradients' device.

    Returns:
        ``None``, and nothing was written, where gradients are not plain or torch has to see every
        operation; also where the norm is not finite and ``nonfinite`` is "error": the pipeline
        then finds the gradients that are to blame.
    """
    done = clip(tensors)
    if not isinstance(done, tuple):
        return done
    norm, written = done  # on a GPU all of them: the host does not know whether any was written
    native.bump_versions(written)
    return norm
