"""``run --monitor``: a Monitor for every list of parameters, and a report when the process ends."""

import gc
import math
import multiprocessing.util
import os
import sys
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedclip import call
from fusedclip.monitor import Monitor
from fusedclip.parameters import known_names


@dataclass(frozen=True)
class _Watched:
    """The tensors that a training clips together."""

    first: "weakref.ref[Tensor]"
    title: str
    monitor: Monitor
    rank: int


class Watching:
    """An observer of ``call``: one Monitor for each list of parameters, told apart by its first
    tensor and its length. A compiled clip is given gradients, new ones at every step: lists of
    those are told apart by their shapes."""

    def __init__(self) -> None:
        self._watched: dict[Hashable, _Watched] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Monitor | None:
        if not tensors:
            return None
        lasting = tensors[0].requires_grad
        key: Hashable = (id(tensors[0]), len(tensors))
        if not lasting:
            key = tuple(tensor.shape for tensor in tensors)
        watched = self._watched.get(key)
        if watched is None or (lasting and watched.first() is not tensors[0]):
            title, names = _names(tensors)
            monitor = Monitor(math.inf, names=names)
            watched = _Watched(weakref.ref(tensors[0]), title, monitor, _rank())
            self._watched[key] = watched
        return watched.monitor

    def report(self) -> str:
        """Summary and advice of each list; nothing for another rank than 0."""
        lines = []
        for watched in self._watched.values():
            if watched.rank == 0:
                summary, advice = watched.monitor.summary(), watched.monitor.advice()
                lines.append(
                    f"fusedclip: gradient clipping, {watched.title}: {summary}\n{advice}\n"
                )
        return "".join(lines)


def watch() -> None:
    """Watch from now on; the report goes to stderr when the process ends."""
    watching = Watching()
    call.observers.insert(0, watching)

    def report() -> None:
        sys.stderr.write(watching.report())

    # Unlike atexit's, also run at the end of a process that multiprocessing has started.
    multiprocessing.util.Finalize(None, report, exitpriority=0)


def _names(tensors: Sequence[Tensor]) -> tuple[str, list[str] | None]:
    """A title, and the names of the parameters, from the module that has most of them.

    All modules that exist in this process are looked at.
    """
    count = f"{len(tensors):,} tensor{'s' * (len(tensors) != 1)}"
    best: nn.Module | None = None
    most = 0
    names: dict[int, str] = {}
    # Not isinstance(): of proxy objects it reads __class__, which may import modules or warn.
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        known = known_names(module)
        own = sum(id(tensor) in known for tensor in tensors) or len(tensors) * _same_shapes(
            module, tensors
        )
        if own > most:
            best, most, names = module, own, known
    if best is None:
        return count, None
    listed = [names.get(id(tensor), f"parameters[{i}]") for i, tensor in enumerate(tensors)]
    if _same_shapes(best, tensors):
        listed = [name for name, p in best.named_parameters() if p.grad is not None]
    return f"{count} of {type(best).__name__}", listed


def _same_shapes(module: nn.Module, gradients: Sequence[Tensor]) -> bool:
    """Whether the shapes are those of the module's gradients: a compiled clip is given copies."""
    if gradients[0].requires_grad:
        return False
    own = [p.shape for p in module.parameters() if p.grad is not None]
    return own == [gradient.shape for gradient in gradients]


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
