"""A percentile of the norms seen so far."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedclip.checks import checked_count, checked_number
from fusedclip.policies.policy import ThresholdPolicy


@dataclass(frozen=True, eq=False)
class AutoClip(ThresholdPolicy):
    r"""Clip at a percentile of the norms seen so far.

    .. math:: \tau_t = \operatorname{percentile}_p\{\lVert g_s\rVert : t - window < s \le t\}

    with linear interpolation between ranks, as ``numpy.percentile``. The history has the norms
    before clipping, this step's included: ``percentile=10``, the paper's choice, clips about nine
    steps in ten, and 100 none.

    Args:
        percentile: p, in (0, 100].
        window: how many norms are remembered, >= 1. The paper keeps all of them; here memory is
            bounded (16 bytes a norm).
        warmup: how many norms must have been seen before anything is clipped, in [0, window]. The
            paper has no warm-up: the first norm is its own threshold.

    A NaN or infinite norm does not enter the history; the threshold of such a step is the last one,
    or ``inf`` when there was none.

    Source: Seetharaman et al. 2020, arXiv 2007.14469.

    >>> policy = fusedclip.AutoClip(percentile=90)
    >>> policy.threshold(torch.tensor(2.0))
    tensor(2., dtype=torch.float64)
    """

    percentile: float = 10.0
    window: int = 10_000
    warmup: int = 0

    def __post_init__(self) -> None:
        checked_number("percentile", self.percentile, 0.0, 100.0, "(0, 100]")
        checked_count("window", self.window, 1)
        checked_count("warmup", self.warmup, 0)
        if self.warmup > self.window:
            raise ValueError(
                f"warmup: expected at most window={self.window} norms, got {self.warmup}"
            )
        self._memory.update(self._fresh(1))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        ranked = self._memory["history"].sort(1).values
        if ranked.shape == self._memory["ranked"].shape:
            self._memory["ranked"].copy_(ranked)
        else:
            self._memory["ranked"] = ranked

    def _saved(self) -> tuple[str, ...]:
        return ("history", "seen")

    def _fresh(self, rows: int) -> dict[str, Tensor]:
        empty = torch.full((rows, self.window), math.inf, dtype=torch.float64, device="cpu")
        return {
            "history": empty,  # a place without a norm holds inf, which ranks behind all norms
            "ranked": empty.clone(),  # the same values in ascending order
            "seen": torch.zeros(rows, 1, dtype=torch.int64, device="cpu"),
        }

    def _thresholds(self, norms: Tensor, enters: Tensor) -> Tensor:
        history, ranked, seen = (self._memory[name] for name in ("history", "ranked", "seen"))
        slot = seen % self.window
        oldest = history.gather(1, slot)
        enters = enters[:, None]
        newest = torch.where(enters, norms[:, None], oldest)  # in place of itself nothing changes
        history.scatter_(1, slot, newest)
        _replace(ranked, oldest, newest)
        seen.add_(enters)

        count = seen.clamp(max=self.window)
        last = (count - 1).clamp_(min=0)
        rank = last.double() * (self.percentile / 100)  # [segments, 1], fractional
        below = rank.long()
        above = torch.minimum(below + 1, last)
        between = torch.lerp(ranked.gather(1, below), ranked.gather(1, above), rank - below)
        return torch.where(count < max(self.warmup, 1), math.inf, between).squeeze(1)


def _replace(ranked: Tensor, old: Tensor, new: Tensor) -> None:
    """Takes ``old`` [rows, 1] out of ascending lists [rows, n], in place, and puts ``new`` in.

    A tenth of the time of sorting again.
    """
    leaves = torch.searchsorted(ranked, old)
    enters = torch.searchsorted(ranked, new) - (old < new).long()
    # Where each comes from: those behind `enters` move up by one, those behind `leaves` down.
    source = torch.arange(ranked.shape[1], device=ranked.device).expand(ranked.shape)
    source = source - (source > enters).long()
    source += (source >= leaves).long()
    source.clamp_(max=ranked.shape[1] - 1)
    ranked.copy_(ranked.gather(1, source))
    ranked.scatter_(1, enters, new)
