"""One list of gradients, clipped by torch and by fusedclip in turn: the cold and the busy rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import fusedclip

from ..workloads import equal

Clip = Callable[[Sequence[nn.Parameter], float], Any]

CONTESTANTS: dict[str, Clip] = {"torch": nn.utils.clip_grad_norm_, "fusedclip": fusedclip.clip_}

_READ = np.ones(8_000_000)  # 64 MB, more than the caches of one core hold
_IDLE = 5e-3  # seconds, after which the threads of OpenMP no longer spin
_SHRINK = 0.9  # each threshold of a clipped block is so much lower than the one before


@dataclass(frozen=True)
class Spec:
    count: int
    elements: int  # of each tensor, fp32
    clipped: bool
    cold: bool  # before each call the caches are filled with other data


@dataclass(frozen=True)
class Amount:
    """So many seconds, but no fewer and no more rounds: a block of calls of each contestant."""

    seconds: float
    least: int
    most: int
    block: int = 1


class Calls:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.parameters = equal(spec.count, spec.elements).parameters(torch.device("cpu"))
        self.grads = [p.grad for p in self.parameters if p.grad is not None]
        self.originals = [grad.clone() for grad in self.grads]
        self.norm = float(nn.utils.get_total_norm(self.grads))
        for clip in CONTESTANTS.values():  # code and threads are there before anything is timed
            self.block(clip, 1)

    def turn(self, amount: Amount) -> dict[str, list[float]]:
        """Seconds of every call, by contestant."""
        times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        end = time.perf_counter() + amount.seconds
        rounds = 0
        while rounds < amount.least or (rounds < amount.most and time.perf_counter() < end):
            for name in in_turn(rounds):
                times[name] += self.block(CONTESTANTS[name], amount.block)
            rounds += 1
        return times

    def block(self, clip: Clip, calls: int) -> list[float]:
        """Seconds of each call. A clipped list is filled anew only after the last of them, so that
        nothing but clips runs in a block: the threshold falls from call to call instead."""
        seconds = []
        max_norm = 2 * self.norm
        for call in range(calls):
            if self.spec.clipped:
                max_norm = self.norm * _SHRINK ** (call + 1)
            if self.spec.cold:
                as_after_a_backward()
            begin = time.perf_counter()
            clip(self.parameters, max_norm)
            seconds.append(time.perf_counter() - begin)
        if self.spec.clipped:
            torch._foreach_copy_(self.grads, self.originals)
        return seconds


def in_turn(round_: int) -> Sequence[str]:
    """Every other round backwards, so that nobody is always the one after the other."""
    names = list(CONTESTANTS)
    return names if round_ % 2 else names[::-1]


def as_after_a_backward() -> None:
    """The caches hold other things, the other threads have been idle; this thread was at work.

    numpy's sum runs on this thread alone.
    """
    time.sleep(_IDLE)
    _READ.sum()
