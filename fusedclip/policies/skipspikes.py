"""Leave out the steps that stand out."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fusedclip.checks import checked_count, checked_number
from fusedclip.policies.policy import Policy, checked
from fusedclip.rule import Decision


@dataclass(frozen=True, eq=False)
class SkipSpikes(Policy):
    r"""Leave out the steps whose norm, or loss, is an outlier among the recent ones; clip nothing.

    A step is taken if, with mean and (sample) deviation of the last ``window`` norms before it,

    .. math:: \lVert g_t\rVert \le \mu + deviations \cdot \sigma

    and the same holds of the loss where ``observe`` was told of it. The norm is that of all
    gradients, whatever the scope, since a step is left out as a whole. Until half a window is known
    all are taken. A step with a NaN or infinite norm or loss is always left out and not remembered;
    a spike that is finite is remembered, so that a change that stays is soon usual.

    As ``Clipper(model, SkipSpikes())`` it is the decision; ``Clipper(model, 1.0,
    skip_above=SkipSpikes())`` also clips.

    Args:
        deviations: > 0.
        window: how many values are remembered, >= 4.

    Source: ``SkipStepOptimizer`` of OLMo-core (its defaults); "OLMo 2", arXiv 2501.00656.

    >>> policy = fusedclip.SkipSpikes()
    >>> fusedclip.Clipper(model, 1.0, skip_above=policy).attach(optimizer)
    >>> policy.observe(loss)  # optional, before each optimizer.step()
    """

    may_skip: ClassVar[bool] = True

    deviations: float = 6.0
    window: int = 128
    _loss: list[Tensor | float] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        checked_number("deviations", self.deviations, 0.0, math.inf, "(0, inf)")
        checked_count("window", self.window, 4)
        self._memory.update(self._fresh(2))

    def observe(self, loss: Tensor | float) -> None:
        """The loss of the step to come, a number or a tensor of one element; no host sync."""
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss: expected one element, got shape {tuple(loss.shape)}")
        self._loss[:] = [loss.detach().clone() if isinstance(loss, Tensor) else float(loss)]

    def decide(self, norms: Tensor, whole: Tensor | None = None) -> Decision:
        checked(norms)
        if whole is None:
            whole = torch.linalg.vector_norm(norms, dtype=torch.float64)
        with torch.no_grad():
            self._ready_for(2, norms.device)
            values = [whole.to(torch.float64).reshape(1)]
            for loss in self._loss:
                own = torch.as_tensor(loss, dtype=torch.float64, device=norms.device)
                values.append(own.reshape(1))
            self._loss.clear()
            skip = self._outliers(torch.cat(values)).any()
        factors = torch.ones(norms.numel(), dtype=torch.float64, device=norms.device)
        return Decision(factors, math.inf, skip)

    def ahead(self, count: int, device: torch.device) -> float:
        return math.inf

    def _fresh(self, rows: int) -> dict[str, Tensor]:
        """A row for the norms and one for the losses."""
        return {
            "history": torch.zeros(rows, self.window, dtype=torch.float64, device="cpu"),
            "seen": torch.zeros(rows, 1, dtype=torch.int64, device="cpu"),
        }

    def _outliers(self, values: Tensor) -> Tensor:
        """Which values, of the norm and perhaps the loss, are; all enter the memory. bool."""
        history = self._memory["history"][: len(values)]
        seen = self._memory["seen"][: len(values)]
        values = values[:, None]
        known = seen.clamp(max=self.window)
        held = torch.arange(self.window, device=values.device) < known
        mean = history.sum(1, keepdim=True) / known  # a place without a value holds 0
        squares = torch.where(held, history - mean, 0.0).square().sum(1, keepdim=True)
        limit = mean + self.deviations * (squares / (known - 1)).sqrt()
        finite = values.isfinite()
        judged = known >= max(2, self.window // 2)
        outliers = ~finite | (judged & ~(values <= limit))

        slot = seen % self.window
        history.scatter_(1, slot, torch.where(finite, values, history.gather(1, slot)))
        seen.add_(finite)
        return outliers
