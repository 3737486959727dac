"""A Monitor for every clip of this process, and what they saw at its end: ``run --monitor``."""

import gc
import math
import multiprocessing.util
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedclip import clip
from fusedclip.monitor import Monitor


@dataclass(frozen=True)
class _Watched:
    """The parameters that a training clips together."""

    first: "weakref.ref[Tensor]"
    title: str
    monitor: Monitor
    rank: int


class Watching:
    """An observer of ``clip``: one Monitor for each list of parameters, told apart by its first
    tensor and its length."""

    def __init__(self) -> None:
        self._watched: dict[tuple[int, int], _Watched] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Monitor | None:
        if not tensors:
            return None
        key = (id(tensors[0]), len(tensors))
        watched = self._watched.get(key)
        if watched is None or watched.first() is not tensors[0]:
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
    clip.observers.insert(0, watching)

    def report() -> None:
        sys.stderr.write(watching.report())

    # Unlike atexit's, also run at the end of a process that multiprocessing has started.
    multiprocessing.util.Finalize(None, report, exitpriority=0)


def _names(tensors: Sequence[Tensor]) -> tuple[str, list[str] | None]:
    """A title, and the parameters' names: of the module alive here that has the most of them."""
    count = f"{len(tensors):,} tensor{'s' * (len(tensors) != 1)}"
    wanted = {id(tensor) for tensor in tensors}
    best: nn.Module | None = None
    names: dict[int, str] = {}
    # Not isinstance: it asks stand-ins for their class, which import or warn.
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        own = {id(p): name for name, p in module.named_parameters() if id(p) in wanted}
        if len(own) > len(names):
            best, names = module, own
    if best is None:
        return count, None
    listed = [names.get(id(tensor), f"parameters[{i}]") for i, tensor in enumerate(tensors)]
    return f"{count} of {type(best).__name__}", listed


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
