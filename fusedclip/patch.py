"""Put fusedclip behind torch's own names, and take it away again.

``patch()`` replaces the four functions in ``torch.nn.utils`` and ``torch.nn.utils.clip_grad``, so
that a framework which calls them clips with fusedclip. Modules that hold an old function by
``from torch.nn.utils import clip_grad_norm_`` are reported, and changed too with ``rebind=True``.
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any

import torch.nn.utils
from torch import Tensor
from torch.nn.utils import clip_grad

from fusedclip.clip import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

# (module, attribute) → ours; the underscored names are what torch's own functions call.
_TARGETS: dict[tuple[ModuleType, str], Callable[..., Any]] = {
    (torch.nn.utils, "clip_grad_norm_"): clip_grad_norm_,
    (torch.nn.utils, "get_total_norm"): get_total_norm,
    (torch.nn.utils, "clip_grads_with_norm_"): clip_grads_with_norm_,
    (torch.nn.utils, "clip_grad_value_"): clip_grad_value_,
    (clip_grad, "clip_grad_norm_"): clip_grad_norm_,
    (clip_grad, "_get_total_norm"): get_total_norm,
    (clip_grad, "_clip_grads_with_norm_"): clip_grads_with_norm_,
    (clip_grad, "clip_grad_value_"): clip_grad_value_,
}

# What was replaced, newest last: (module, attribute, the object that was there). Empty: unpatched.
_replaced: list[tuple[ModuleType, str, Any]] = []
_depth = 0
# What takes the place of _TARGETS' values, and the threshold it insists on.
_installed: dict[tuple[ModuleType, str], Callable[..., Any]] = {}
_max_norm: float | None = None


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
        global _depth
        _depth = max(0, _depth - 1)
        if _depth == 0:
            _restore()


def patch(*, rebind: bool = False, max_norm: float | None = None) -> Patch:
    """Make ``torch.nn.utils.clip_grad_norm_`` and its three relatives fusedclip's.

    Calling it again changes nothing. ``with fusedclip.patch():`` undoes it at the end of the
    outermost block; ``unpatch()`` undoes it at once. Modules that imported one of the functions by
    name keep torch's; a warning lists them (``.stale`` on the result too).

    Args:
        rebind: replace the function in those modules as well.
        max_norm: the threshold, >= 0, of every clip by a norm through torch's names, whatever
            finite one the caller passes; an infinite one, which only measures, stays.

    Raises:
        ValueError: ``max_norm`` is no threshold, or torch is patched with another one.
    """
    global _depth
    _set_max_norm(max_norm)
    _depth += 1
    originals = {id(_original(module, name)): new for (module, name), new in _installed.items()}
    for (module, name), new in _installed.items():
        if getattr(module, name) is not new:
            _replace(module, name, new)
    stale = list(_references(originals))
    if rebind:
        for module, name, new in stale:
            _replace(module, name, new)
        stale = []
    names = [f"{module.__name__}.{name}" for module, name, _ in stale]
    if names:
        warnings.warn(
            f"fusedclip.patch: torch's function is still used by {', '.join(names)}, which "
            "imported it by name; call fusedclip.patch(rebind=True) to replace it there too",
            stacklevel=2,
        )
    return Patch(names)


def unpatch() -> None:
    """Undo every ``patch()``, exactly; harmless when nothing is patched."""
    global _depth
    _depth = 0
    _restore()


def _set_max_norm(max_norm: float | None) -> None:
    """Fill ``_installed`` at the first patch; a later one may leave the threshold as it is."""
    global _max_norm
    if max_norm is not None and not max_norm >= 0.0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {max_norm}")
    if not _replaced:
        _max_norm = max_norm
        _installed.update(_TARGETS if max_norm is None else _with_threshold(max_norm))
    elif max_norm not in (None, _max_norm):
        raise ValueError(
            f"max_norm: torch is patched with max_norm={_max_norm}, got {max_norm}; call "
            "fusedclip.unpatch() first"
        )


def _with_threshold(max_norm: float) -> dict[tuple[ModuleType, str], Callable[..., Any]]:
    """``_TARGETS`` with ``max_norm`` in place of a finite threshold."""

    def limit(asked: float) -> float:
        asked = float(asked)  # torch takes strings and tensors too
        return max_norm if math.isfinite(asked) else asked

    @functools.wraps(clip_grad_norm_)
    def clip_at_norm(parameters: Any, max_norm: float, *arguments: Any, **options: Any) -> Tensor:
        return clip_grad_norm_(parameters, limit(max_norm), *arguments, **options)

    @functools.wraps(clip_grads_with_norm_)
    def clip_with_norm(parameters: Any, max_norm: float, *arguments: Any, **options: Any) -> None:
        clip_grads_with_norm_(parameters, limit(max_norm), *arguments, **options)

    replaced: dict[Callable[..., Any], Callable[..., Any]] = {
        clip_grad_norm_: clip_at_norm,
        clip_grads_with_norm_: clip_with_norm,
    }
    return {place: replaced.get(ours, ours) for place, ours in _TARGETS.items()}


def _original(module: ModuleType, name: str) -> Any:
    for replaced_module, replaced_name, old in _replaced:
        if replaced_module is module and replaced_name == name:
            return old
    return getattr(module, name)


def _replace(module: ModuleType, name: str, new: Any) -> None:
    _replaced.append((module, name, getattr(module, name)))
    setattr(module, name, new)


def _restore() -> None:
    while _replaced:
        module, name, old = _replaced.pop()
        setattr(module, name, old)


def _references(
    originals: dict[int, Callable[..., Any]],
) -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
    """(module, attribute, replacement) wherever an imported module holds one of torch's."""
    for module in list(sys.modules.values()):
        # Only what is already in the module's dictionary: getattr could trigger lazy imports.
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == "fusedclip":
            continue
        for name, value in list(vars(module).items()):
            new = originals.get(id(value))
            if new is not None:
                yield module, name, new
