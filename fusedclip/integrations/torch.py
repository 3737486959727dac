"""fusedclip behind torch's own names.

``patch()`` replaces the four functions in ``torch.nn.utils`` and ``torch.nn.utils.clip_grad``, so
that a framework which calls them clips with fusedclip. Modules that hold an old function by
``from torch.nn.utils import clip_grad_norm_`` are reported, and changed too with ``rebind=True``.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fusedclip.call import Call
from fusedclip.checks import checked_skip
from fusedclip.functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from fusedclip.integrations.seams import Function, Seam, Seams
from fusedclip.parameters import parameter_list
from fusedclip.rule import Threshold

if TYPE_CHECKING:
    from fusedclip.leaving_out import SkippedSteps


class Patch:
    """What ``patch()`` returns: usable as a context manager, which undoes it at the end.

    ``stale`` names the references to torch's functions, ``"module.attribute"``, that other modules
    imported before the patch and still use.
    """

    def __init__(self, stale: list[str]) -> None:
        self.stale = stale

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _seams.__exit__(kind, error, traceback)
        if not _seams.active:
            unpatch()


def patch(
    *,
    rebind: bool = False,
    max_norm: float | None = None,
    skip_above: Threshold | None = None,
) -> Patch:
    """Make ``torch.nn.utils.clip_grad_norm_`` and its three relatives fusedclip's.

    And ``FullyShardedDataParallel.clip_grad_norm_`` (FSDP1), once torch's FSDP is imported.

    Calling it again changes nothing. ``with fusedclip.patch():`` undoes it at the end of the
    outermost block; ``unpatch()`` undoes it at once. Modules that imported one of the functions by
    name keep torch's; a warning lists them (``.stale`` on the result too).

    Args:
        rebind: replace the function in those modules as well.
        max_norm: the threshold, >= 0, of every clip by a norm through torch's names, whatever
            finite one the caller passes; an infinite one, which only measures, stays.
        skip_above: leave out the optimizer's step that follows a ``clip_grad_norm_`` whose norm is
            larger, or if a policy (``SkipSpikes``) says so: on the device for ``fused=True``,
            else the step waits for the norm.

    Raises:
        ValueError: ``max_norm`` is no threshold, or torch is patched with another one.
    """
    _configure(max_norm, skip_above)
    from fusedclip.integrations import fsdp1  # here: for most programs it is import time

    _seams.patch()
    fsdp1.patch_when_imported()
    if rebind:
        _seams.rebind()
    stale = _seams.stale()
    if stale:
        warnings.warn(
            f"fusedclip.patch: torch's function is still used by {', '.join(stale)}, which "
            "imported it by name; call fusedclip.patch(rebind=True) to replace it there too",
            stacklevel=2,
        )
    return Patch(stale)


def unpatch() -> None:
    """Undo every ``patch()``, exactly; harmless when nothing is patched."""
    from fusedclip.integrations import fsdp1

    _seams.unpatch()
    fsdp1.unpatch()
    if _instead.skipped is not None:
        _instead.skipped.remove()
        _instead.skipped = None


@dataclass
class _Instead:
    """What replaces the settings of those who call torch's functions."""

    max_norm: float | None = None  # of a finite threshold
    skip_above: Threshold | None = None
    skipped: "SkippedSteps | None" = None


_instead = _Instead()


def _configure(max_norm: float | None, skip_above: Threshold | None) -> None:
    """Remember it at the first patch; a later one may leave everything as it is."""
    if max_norm is not None and not max_norm >= 0.0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {max_norm}")
    skip_above = checked_skip(skip_above)
    own = _instead
    if not _seams.active:
        own.max_norm, own.skip_above = max_norm, skip_above
        if own.skipped is not None:  # of a patch that was undone since
            own.skipped.remove()
        own.skipped = None
        if skip_above is not None:
            from fusedclip.leaving_out import SkippedSteps

            own.skipped = SkippedSteps()
        return
    for name, given in (("max_norm", max_norm), ("skip_above", skip_above)):
        if given is not None and given is not (before := getattr(own, name)) and given != before:
            raise ValueError(
                f"{name}: torch is patched with {name}={before}, got {given}; call "
                "fusedclip.unpatch() first"
            )


def limit(asked: float) -> float:
    """The threshold of a clip that asks for ``asked``."""
    asked = float(asked)  # torch takes strings and tensors too
    own = _instead.max_norm
    return asked if own is None or not math.isfinite(asked) else own


def skip_above() -> Threshold | None:
    """The norm above which a step is left out."""
    return _instead.skip_above


@functools.wraps(clip_grad_norm_)
def _clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    threshold, spike = limit(max_norm), skip_above()
    if spike is None or is_dynamo_compiling():
        return clip_grad_norm_(parameters, threshold, norm_type, error_if_nonfinite, foreach)
    nonfinite = "error" if error_if_nonfinite else "propagate"
    call = Call(
        threshold, float(norm_type), nonfinite, strict=False, foreach=foreach, skip_above=spike
    )
    return call.apply(parameter_list(parameters))


@functools.wraps(clip_grads_with_norm_)
def _clip_grads_with_norm_(
    parameters: Any, max_norm: float, *arguments: Any, **options: Any
) -> None:
    clip_grads_with_norm_(parameters, limit(max_norm), *arguments, **options)


def _norm_clip(original: Function) -> Function:
    plain = _instead.max_norm is None and _instead.skip_above is None
    return clip_grad_norm_ if plain else _clip_grad_norm_


def _clip_with_norm(original: Function) -> Function:
    return clip_grads_with_norm_ if _instead.max_norm is None else _clip_grads_with_norm_


_PUBLIC, _OWN = "torch.nn.utils", "torch.nn.utils.clip_grad"
_CLIP = ("parameters", "max_norm", "norm_type", "error_if_nonfinite", "foreach")
_NORM = ("tensors", "norm_type", "error_if_nonfinite", "foreach")
_WITH_NORM = ("parameters", "max_norm", "total_norm", "foreach")
_VALUE = ("parameters", "clip_value", "foreach")

# The underscored names, which torch's own functions call, stay torch's: a module that imported one
# of those functions by name has it whole.
_seams = Seams(
    "fusedclip.patch",
    [
        Seam(_PUBLIC, "clip_grad_norm_", _CLIP, _norm_clip, everywhere=False),
        Seam(_PUBLIC, "get_total_norm", _NORM, lambda _: get_total_norm, everywhere=False),
        Seam(_PUBLIC, "clip_grads_with_norm_", _WITH_NORM, _clip_with_norm, everywhere=False),
        Seam(_PUBLIC, "clip_grad_value_", _VALUE, lambda _: clip_grad_value_, everywhere=False),
        Seam(_OWN, "clip_grad_norm_", _CLIP, _norm_clip, everywhere=False),
        Seam(_OWN, "clip_grad_value_", _VALUE, lambda _: clip_grad_value_, everywhere=False),
    ],
    kept=frozenset({f"{_OWN}._get_total_norm", f"{_OWN}._clip_grads_with_norm_"}),
)
