"""Thresholds that follow the training: ``AutoClip``, ``ZClip``.

A policy sees the norm of each step before clipping and answers with the threshold for that step.
What it remembers lives in tensors beside the norms and all branches are ``torch.where``: nothing
waits for the device, and a captured CUDA graph goes on remembering.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedclip.checks import checked_count, checked_number


@dataclass(frozen=True, eq=False)
class Policy(ABC):
    """What policies share: memory that follows the norms from device to device."""

    _memory: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def threshold(self, norm: Tensor) -> Tensor:
        """The threshold for a step whose gradients have this norm, which enters the history.

        Args:
            norm: before clipping, 0-dim, fp32 or fp64.

        Returns:
            0-dim fp64 on the norm's device; ``inf`` says not to clip.
        """
        if norm.dim() != 0 or not norm.dtype.is_floating_point:
            raise ValueError(
                f"norm: expected a 0-dim float tensor, got shape {tuple(norm.shape)}, {norm.dtype}"
            )
        with torch.no_grad():
            for name, tensor in self._memory.items():
                self._memory[name] = tensor.to(norm.device)  # the same tensor when it is there
            return self._threshold(norm.to(torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """A copy of the history. The configuration is the constructor's, not part of it."""
        return {name: self._memory[name].clone() for name in self._saved()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on, bit for bit, where ``state_dict()`` was taken, on whatever device comes next.

        Raises:
            ValueError: the state is another policy's, or its window has another length.
        """
        for name in self._saved():
            own, given = self._memory[name], state.get(name)
            if not isinstance(given, Tensor) or given.shape != own.shape:
                got = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
                raise ValueError(
                    f"state_dict[{name!r}]: expected a tensor of shape {tuple(own.shape)}, got "
                    f"{got}; load it into a {type(self).__name__} made with the same arguments"
                )
        for name in self._saved():
            # Into the same memory: a captured graph has its address.
            self._memory[name].copy_(state[name])

    def _saved(self) -> tuple[str, ...]:
        return tuple(self._memory)

    @abstractmethod
    def _threshold(self, norm: Tensor) -> Tensor:
        """``threshold`` for an fp64 norm, where the memory is."""


@dataclass(frozen=True, eq=False)
class AutoClip(Policy):
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
        empty = torch.full((self.window,), math.inf, dtype=torch.float64, device="cpu")
        # A place without a norm holds inf, which ranks behind all norms.
        self._memory["history"] = empty
        self._memory["ranked"] = empty.clone()  # the same values in ascending order
        self._memory["seen"] = torch.zeros(1, dtype=torch.int64, device="cpu")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._memory["ranked"].copy_(self._memory["history"].sort().values)

    def _saved(self) -> tuple[str, ...]:
        return ("history", "seen")

    def _threshold(self, norm: Tensor) -> Tensor:
        history, ranked, seen = (self._memory[name] for name in ("history", "ranked", "seen"))
        slot = seen % self.window
        oldest = history.gather(0, slot)
        finite = norm.isfinite()
        newest = torch.where(finite, norm, oldest)  # [1]; in place of itself nothing changes
        history.scatter_(0, slot, newest)
        _replace(ranked, oldest, newest)
        seen.add_(finite)

        count = seen.clamp(max=self.window)
        last = (count - 1).clamp_(min=0)
        rank = last.double() * (self.percentile / 100)  # [1], fractional
        below = rank.long()
        above = torch.minimum(below + 1, last)
        between = torch.lerp(ranked.gather(0, below), ranked.gather(0, above), rank - below)
        return torch.where(count < max(self.warmup, 1), math.inf, between).squeeze()


def _replace(ranked: Tensor, old: Tensor, new: Tensor) -> None:
    """Takes ``old`` [1] out of an ascending list, in place, and puts ``new`` [1] in.

    A tenth of the time of sorting again.
    """
    leaves = torch.searchsorted(ranked, old)
    enters = torch.searchsorted(ranked, new) - (old < new).long()
    # Where each comes from: those behind `enters` move up by one, those behind `leaves` down.
    source = torch.arange(len(ranked), device=ranked.device)
    source -= (source > enters).long()
    source += (source >= leaves).long()
    source.clamp_(max=len(ranked) - 1)
    ranked.copy_(ranked.gather(0, source))
    ranked.scatter_(0, enters, new)


@dataclass(frozen=True, eq=False)
class ZClip(Policy):
    r"""Clip the norms that are outliers among the recent ones.

    With the exponential moving mean :math:`\mu` and deviation :math:`\sigma` of the norms before
    this step,

    .. math::
        z_t = \frac{\lVert g_t\rVert - \mu}{\sigma + \epsilon}, \qquad
        \tau_t = \begin{cases}
            \mu + \frac{z^2}{z_t}\,\sigma & z_t > z \\ \infty & \text{otherwise}
        \end{cases}

    so the further out a norm is, the closer to the mean it is clipped. Then the norm enters the
    statistics, a spike as what it was clipped to, :math:`x_t = \min(\lVert g_t\rVert, \tau_t)`:

    .. math::
        \mu \leftarrow \alpha\mu + (1 - \alpha)\,x_t, \qquad
        \sigma^2 \leftarrow \alpha\sigma^2 + (1 - \alpha)(x_t - \mu)^2

    Args:
        alpha: the weight of the past, in (0, 1).
        z: how many deviations make an outlier, > 0.
        warmup: the number of norms, >= 1, whose mean and (population) variance the averages start
            from. Nothing is clipped during these steps.
        eps: added to the deviation, > 0, for norms that do not vary.

    A NaN or infinite norm does not enter the statistics. After the warm-up the threshold of such a
    step is :math:`\mu`, the limit of the rule for an ever larger norm.

    Source: Kumar et al. 2025, arXiv 2504.02507 (its reciprocal adjustment, and its defaults).

    >>> policy = fusedclip.ZClip()
    >>> policy.threshold(torch.tensor(2.0))
    tensor(inf, dtype=torch.float64)
    """

    alpha: float = 0.97
    z: float = 2.5
    warmup: int = 25
    eps: float = 1e-6

    def __post_init__(self) -> None:
        checked_number("alpha", self.alpha, 0.0, 1.0, "(0, 1)")
        checked_number("z", self.z, 0.0, math.inf, "(0, inf)")
        checked_count("warmup", self.warmup, 1)
        checked_number("eps", self.eps, 0.0, math.inf, "(0, inf)")
        for name in ("mean", "variance", "seen"):
            self._memory[name] = torch.zeros((), dtype=torch.float64, device="cpu")

    def _threshold(self, norm: Tensor) -> Tensor:
        mean, variance, seen = (self._memory[name] for name in ("mean", "variance", "seen"))
        finite = norm.isfinite()
        warming = seen < self.warmup
        deviation = variance.sqrt()
        score = (norm - mean) / (deviation + self.eps)
        spike = ~warming & (score > self.z)
        clipped = mean + self.z**2 / score * deviation
        threshold = torch.where(spike, clipped, math.inf)
        threshold = torch.where(finite | warming, threshold, mean)

        value = torch.where(spike, clipped, norm)
        seen.add_(finite)
        # 1/n turns the moving averages into those of the first n norms, one by one (Welford).
        weight = torch.where(warming, 1 / seen, 1 - self.alpha)
        new_mean = mean + weight * (value - mean)
        spread = torch.where(warming, value - mean, value - new_mean) * (value - new_mean)
        new_variance = variance + weight * (spread - variance)
        mean.copy_(torch.where(finite, new_mean, mean))
        variance.copy_(torch.where(finite, new_variance, variance))
        return threshold


# By their names in configuration files.
POLICIES: dict[str, type[Policy]] = {kind.__name__.lower(): kind for kind in (AutoClip, ZClip)}
