"""One list of gradients, clipped again and again: the cold and the busy rows."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..workloads import equal
from .turns import CONTESTANTS, Clip, Times, Turn, size

_READ = np.ones(8_000_000)  # 64 MB, more than the caches of one core hold
_IDLE = 5e-3  # seconds, after which the threads of OpenMP no longer spin
_SHRINK = 0.9  # each threshold of a clipped block is so much lower than the one before


@dataclass(frozen=True)
class Gradients:
    count: int
    elements: int  # of each tensor, fp32
    cold: bool  # before each call the caches are filled with other data


class Calls:
    def __init__(self, of: Gradients) -> None:
        self.cold = of.cold
        self.parameters = equal(of.count, of.elements).parameters(torch.device("cpu"))
        self.grads = [p.grad for p in self.parameters if p.grad is not None]
        self.originals = [grad.clone() for grad in self.grads]
        self.norm = float(nn.utils.get_total_norm(self.grads))
        for clip in CONTESTANTS.values():  # code and threads are there before anything is timed
            self.block(clip, 1, clipped=True)

    def size(self) -> dict[str, int]:
        return size(self.parameters)

    def turn(self, turn: Turn) -> Times:
        times: Times = {name: [] for name in CONTESTANTS}
        for names in turn.rounds():
            for name in names:
                times[name] += self.block(CONTESTANTS[name], turn.block, turn.clipped)
        return times

    def block(self, clip: Clip, calls: int, clipped: bool) -> list[float]:
        """Seconds of each call. A clipped list is filled anew only after the last of them, so that
        nothing but clips runs in a block: the threshold falls from call to call instead."""
        seconds = []
        for call in range(calls):
            max_norm = self.norm * _SHRINK ** (call + 1) if clipped else 2 * self.norm
            if self.cold:
                _as_after_a_backward()
            begin = time.perf_counter()
            clip(self.parameters, max_norm)
            seconds.append(time.perf_counter() - begin)
        if clipped:
            torch._foreach_copy_(self.grads, self.originals)
        return seconds


def _as_after_a_backward() -> None:
    """The caches hold other things, the other threads have been idle; this thread was at work.

    numpy's sum runs on this thread alone.
    """
    time.sleep(_IDLE)
    _READ.sum()
