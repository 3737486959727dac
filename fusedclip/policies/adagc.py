"""Each parameter at a multiple of the moving mean of its own norm."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.checks import checked_count, checked_number
from fusedclip.policies.policy import BySegment
from fusedclip.rule import Decision

_EPSILON = 1e-6  # what the kernels add to a norm


@dataclass(frozen=True, eq=False)
class AdaGC(BySegment):
    r"""Clip each norm at a multiple of its own moving mean; made for ``scope="parameter"``.

    In the first ``warmup`` steps by the global norm, while the smallest norm is remembered:

    .. math::
        h = \min\left(1, \frac{\lambda_{abs}}{\lVert g\rVert}\right), \qquad
        \gamma_i \leftarrow \min(\gamma_i, \lVert h\,g_i\rVert)

    then each by its own, in one pass, since the threshold does not depend on the step's norm:

    .. math::
        h_i = \min\left(1, \frac{\lambda_{rel}\,\gamma_i}{\lVert g_i\rVert}\right), \qquad
        \gamma_i \leftarrow \beta\gamma_i + (1 - \beta)\lVert h_i g_i\rVert

    (To the numerator and the denominator of this :math:`h_i` the kernels' :math:`10^{-6}` is added:
    the threshold stays where it is, and no norm is divided by 0.)

    Args:
        relative: lambda_rel, > 0.
        absolute: lambda_abs, > 0, the threshold of the global norm during the warm-up.
        beta: the weight of the past, in (0, 1).
        warmup: steps, >= 1.

    A norm that is NaN, infinite or 0 (a parameter without a gradient) leaves its mean as it is; the
    first norm after a warm-up without any is its mean.

    Source: Wang et al. 2025, arXiv 2502.11034 (its algorithm 1, and its defaults).

    >>> clipper = fusedclip.Clipper(model, fusedclip.AdaGC(), scope="parameter")
    """

    relative: float = 1.05
    absolute: float = 1.0
    beta: float = 0.98
    warmup: int = 100
    # What the host knows of `seen`: at least so many steps, for all rows. A captured graph counts
    # on the device alone. After the warm-up nobody counts.
    _steps: list[int] = field(init=False, repr=False, default_factory=lambda: [0])

    def __post_init__(self) -> None:
        checked_number("relative", self.relative, 0.0, math.inf, "(0, inf)")
        checked_number("absolute", self.absolute, 0.0, math.inf, "(0, inf)")
        checked_number("beta", self.beta, 0.0, 1.0, "(0, 1)")
        checked_count("warmup", self.warmup, 1)
        self._memory.update(self._fresh(1))

    def ahead(self, count: int, device: torch.device) -> Tensor | None:
        if count != len(self._memory["bound"]):
            self._steps[0] = 0  # some rows are new
        if self._steps[0] < self.warmup:
            return None
        self._ready_for(count, device)
        return self._memory["bound"] * self.relative + _EPSILON

    def remember(self, norms: Tensor, whole: Tensor | None) -> None:
        with torch.no_grad():
            rows, bound = norms.to(torch.float64).reshape(-1), self._memory["bound"]
            mean = self._mean(torch.minimum(rows, bound * self.relative))
            torch.where((rows > 0.0) & (rows < math.inf), mean, bound, out=bound)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps[0] = int(self._memory["seen"].min())

    def row(self, index: int, count: int, device: torch.device) -> "AdaGC":
        one = super().row(index, count, device)
        one._steps[0] = self._steps[0]
        return one

    def _fresh(self, rows: int) -> dict[str, Tensor]:
        return {
            "bound": torch.full((rows,), math.inf, dtype=torch.float64, device="cpu"),
            "seen": torch.zeros(rows, dtype=torch.int64, device="cpu"),
        }

    def _decide(self, norms: Tensor, whole: Tensor, by_segment: bool) -> Decision:
        bound, seen = self._memory["bound"], self._memory["seen"]
        warming = seen < self.warmup
        together = (self.absolute / whole).clamp(max=1.0)  # 0-dim; NaN where the norm is
        shortened = together * norms
        limits = bound * self.relative
        coefficients = torch.where(
            warming, together, reference.coefficient(norms, limits + _EPSILON)
        )
        thresholds = torch.where(warming, torch.where(together < 1.0, shortened, math.inf), limits)
        least, mean = torch.fmin(bound, shortened), self._mean(torch.minimum(norms, limits))
        # What a global clip did where one norm is NaN says nothing of the others.
        usable = (norms > 0.0) & (norms < math.inf) & (~warming | whole.isfinite())
        bound.copy_(torch.where(usable, torch.where(warming, least, mean), bound))
        self._count_step()
        return Decision(coefficients, thresholds if by_segment else thresholds.reshape(()))

    def _mean(self, clipped: Tensor) -> Tensor:
        """The moving means with these norms after clipping; the first norm is its own mean."""
        mean = torch.lerp(self._memory["bound"], clipped, 1.0 - self.beta)
        return torch.where(mean.isnan(), clipped, mean)  # an infinite one is none yet

    def _count_step(self) -> None:
        self._memory["seen"].add_(1).clamp_(max=self.warmup)
        if not torch.compiler.is_compiling():
            self._steps[0] += 1
