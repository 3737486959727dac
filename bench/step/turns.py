"""Who clips, and how often: torch and fusedclip in turn."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import fusedclip

Clip = Callable[[Sequence[nn.Parameter], float], Any]
Times = dict[str, list[float]]  # seconds of every call, by name

CONTESTANTS: dict[str, Clip] = {"torch": nn.utils.clip_grad_norm_, "fusedclip": fusedclip.clip_}


@dataclass(frozen=True)
class Turn:
    """Rounds for so many seconds, but no fewer than ``least`` and no more than ``most``.

    In a round each contestant has a block of calls.
    """

    clipped: bool
    seconds: float
    least: int
    most: int
    block: int = 1

    def rounds(self) -> Iterator[Sequence[str]]:
        """The contestants in their order, every other round backwards, so that nobody is always
        the one after the other."""
        names = list(CONTESTANTS)
        end = time.perf_counter() + self.seconds
        done = 0
        while done < self.least or (done < self.most and time.perf_counter() < end):
            yield names if done % 2 else names[::-1]
            done += 1


def size(parameters: Sequence[nn.Parameter]) -> dict[str, int]:
    return {"tensors": len(parameters), "bytes": sum(p.nbytes for p in parameters)}
