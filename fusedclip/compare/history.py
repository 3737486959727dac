"""The settings of a comparison, the history of each arm, and the verdict."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_LAST = 20  # the final loss is the mean over so many steps
ALIKE = 1e-3  # losses this near to each other, relatively, are of one curve in a picture
_BEGIN_RTOL = 1e-5  # the first loss comes before any clipping: only the device's noise may differ


@dataclass(frozen=True)
class Settings:
    max_norm: float = 1.0  # of all arms but the control arm
    steps: int = 300
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm: expected a number > 0 and < inf, got {self.max_norm}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


@dataclass
class History:
    """The losses, norms and learning rates of one arm, by step."""

    arm: str
    max_norm: float  # inf in the control arm
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping
    rates: list[float | None] = field(default_factory=list)  # learning rates, where reported
    clip_seconds: list[float] = field(default_factory=list)

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss is NaN or infinite; training stops there."""
        return next((i for i, x in enumerate(self.losses) if not math.isfinite(x)), None)

    @property
    def final_loss(self) -> float:
        """The mean of the last 20 steps."""
        last = self.losses[-_LAST:]
        return sum(last) / len(last) if last else math.nan

    @property
    def worst_spike(self) -> float:
        """The furthest that a finite loss rose above the lowest loss before it."""
        worst, lowest = 0.0, math.inf
        for loss in filter(math.isfinite, self.losses):
            worst, lowest = max(worst, loss - lowest), min(lowest, loss)
        return worst

    @property
    def median_clip_seconds(self) -> float:
        """Of a step: a mean would say how busy the machine was."""
        return statistics.median(self.clip_seconds) if self.clip_seconds else math.nan

    @property
    def steps_clipped(self) -> int:
        """Steps whose norm was not within the threshold, NaN included; 0 in the control arm."""
        return sum(not norm <= self.max_norm for norm in self.norms if self.max_norm < math.inf)


@dataclass(frozen=True)
class Comparison:
    """The result; the first arm is the control."""

    settings: Settings
    arms: Sequence[History]
    interrupted: bool

    @property
    def begin_alike(self) -> bool:
        """All arms have the same first loss. If not, something random was not seeded."""
        first, *others = [history.losses[0] for history in self.arms]
        return all(
            math.isclose(loss, first, rel_tol=_BEGIN_RTOL)
            or (math.isnan(loss) and math.isnan(first))
            for loss in others
        )

    def verdict(self) -> str:
        """One sentence on the control arm and the last one."""
        if len(self.arms) < 2:
            return "There is nothing to compare with: only one arm has run."
        if not self.begin_alike:
            return (
                "The arms do not begin with the same loss, so this compares two different runs: "
                "seed whatever is random with run.seed."
            )
        control, clipped = self.arms[0], self.arms[-1]
        if clipped.diverged_at is not None:
            return (
                f"With max_norm={clipped.max_norm:g} the loss is NaN or infinite at step "
                f"{clipped.diverged_at}: clipping alone does not save this run, lower the rate."
            )
        if control.diverged_at is not None:
            return (
                f"Without clipping the loss is NaN or infinite at step {control.diverged_at}; with "
                f"it the final loss is {clipped.final_loss:.4g}."
            )
        if clipped.steps_clipped == 0:
            return (
                f"No norm was above max_norm={clipped.max_norm:g}, the largest was "
                f"{max(clipped.norms):.3g}: clipping changed nothing."
            )
        return (
            f"{clipped.steps_clipped} of {len(clipped.norms)} steps were clipped; the final loss "
            f"is {control.final_loss:.4g} without and {clipped.final_loss:.4g} with clipping."
        )


def apart_at(one: Sequence[float], other: Sequence[float], rtol: float = ALIKE) -> int | None:
    r"""The first step whose losses differ: :math:`|a_t - b_t| > rtol \cdot \max(|a_t|, |b_t|)`.

    ``None`` where all that both have are alike; two NaN are.
    """
    for step, (a, b) in enumerate(zip(one, other, strict=False)):
        if not (math.isclose(a, b, rel_tol=rtol) or (math.isnan(a) and math.isnan(b))):
            return step
    return None
