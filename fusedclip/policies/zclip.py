"""Outliers among recent norms."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedclip.checks import checked_count, checked_number
from fusedclip.policies.policy import ThresholdPolicy


@dataclass(frozen=True, eq=False)
class ZClip(ThresholdPolicy):
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
        self._memory.update(self._fresh(1))

    def _fresh(self, rows: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros(rows, dtype=torch.float64, device="cpu")
            for name in ("mean", "variance", "seen")
        }

    def _thresholds(self, norms: Tensor, enters: Tensor) -> Tensor:
        mean, variance, seen = (self._memory[name] for name in ("mean", "variance", "seen"))
        warming = seen < self.warmup
        deviation = variance.sqrt()
        score = (norms - mean) / (deviation + self.eps)
        spike = ~warming & (score > self.z)
        clipped = mean + self.z**2 / score * deviation
        thresholds = torch.where(spike, clipped, math.inf)
        thresholds = torch.where(norms.isfinite() | warming, thresholds, mean)

        value = torch.where(spike, clipped, norms)
        seen.add_(enters)
        # 1/n turns the moving averages into those of the first n norms, one by one (Welford).
        weight = torch.where(warming, 1 / seen, 1 - self.alpha)
        new_mean = mean + weight * (value - mean)
        spread = torch.where(warming, value - mean, value - new_mean) * (value - new_mean)
        new_variance = variance + weight * (spread - variance)
        mean.copy_(torch.where(enters, new_mean, mean))
        variance.copy_(torch.where(enters, new_variance, variance))
        return thresholds
