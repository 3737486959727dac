"""What to make of a summary: a few rules, each with its boundary in one constant.

The rules and their numbers are in common use for reading ``grad_norm`` in logs; they are
heuristics, not theorems.
"""

from dataclasses import dataclass

from fusedclip.monitor.summary import Summary

FEWEST_STEPS = 20  # with fewer, only NaN and infinite norms are reported
OFTEN = 0.25  # of the steps above 0.9 · max_norm
CONSTANTLY = 0.9  # of the steps above 0.95 · max_norm
TINY = 0.1  # max_norm
SPIKE = 100.0  # times the median norm
IN_A_ROW = 5  # steps left out


@dataclass(frozen=True)
class Finding:
    """One thing that stands out."""

    rule: str  # "nonfinite", "skipped", "spike", "squeezed", "unstable", "high" or "idle"
    observation: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.observation} {self.suggestion}"


@dataclass(frozen=True)
class Advice:
    """What stands out, the most urgent first."""

    findings: tuple[Finding, ...]
    steps: int  # that were judged

    def __str__(self) -> str:
        if self.findings:
            return "\n".join(f"- {finding}" for finding in self.findings)
        if self.steps < FEWEST_STEPS:
            return f"{self.steps} steps are too few to judge; ask again after {FEWEST_STEPS}."
        return f"Nothing stands out in the last {self.steps:,} steps; leave max_norm as it is."


def advise(summary: Summary) -> Advice:
    """The rules, on the steps that the summary remembers."""
    findings = [_nonfinite(summary), _skipped(summary)]
    if summary.window >= FEWEST_STEPS:
        findings += [_spike(summary), _squeezed(summary), _high(summary), _idle(summary)]
    return Advice(tuple(finding for finding in findings if finding), summary.window)


def _nonfinite(summary: Summary) -> Finding | None:
    if not summary.nonfinite_recently:
        return None
    names = ", ".join(repr(name) for name in summary.nonfinite_names[:5])
    where = f"at step {summary.nonfinite_step}" + (f" in {names}" if names else "")
    return Finding(
        "nonfinite",
        f"The norm was NaN or infinite in {summary.nonfinite_recently} of {summary.window:,} "
        f"steps, the last time {where}.",
        "With AMP: is unscale_() called before the clip? An overflow now and then is the loss "
        "scale finding its size. Without AMP: look at the data of that step, at divisions, logs "
        "and softmax of long sequences"
        + (" in that layer" if len(summary.nonfinite_names) == 1 else "")
        + '; nonfinite="error" stops there.',
    )


def _skipped(summary: Summary) -> Finding | None:
    """One step left out is what it is for; a row of them is a training that stands still."""
    if summary.skipped_run < IN_A_ROW:
        return None
    return Finding(
        "skipped",
        f"{summary.skipped_run:,} steps in a row were left out, from step "
        f"{summary.skipped_run_step} on ({summary.skipped_recently:,} of {summary.window:,}).",
        "Nothing was learned in them. Is skip_above too low for this model (median norm "
        f"{summary.median:.3g})? If not, the weights are where gradients are large: go back to a "
        "checkpoint before these steps and lower the learning rate.",
    )


def _spike(summary: Summary) -> Finding | None:
    if not summary.max >= SPIKE * summary.median > 0.0:
        return None
    most = summary.top[0] if summary.top else None
    where = f", {most.share:.0%} of its square in {most.name!r}" if most else ""
    return Finding(
        "spike",
        f"The norm was {summary.max:.3g} at step {summary.max_step}, "
        f"{summary.max / summary.median:,.0f} times the median{where}.",
        "Look at the data of that step. A clip shortens such a step and keeps its direction; "
        "skip_above or SkipSpikes() leaves it out.",
    )


def _squeezed(summary: Summary) -> Finding | None:
    if summary.max_norm > TINY or summary.clipped < 0.5:
        return None
    return Finding(
        "squeezed",
        f"max_norm is {summary.max_norm:g} and {_count(summary, summary.clipped)} were clipped, on "
        f"average to {summary.mean_coefficient:.2g} times the gradient.",
        "The gradients are squeezed all the time, so the threshold acts as a smaller learning "
        f"rate and convergence suffers; try the 95th percentile of the norms, {summary.p95:.2g}.",
    )


def _high(summary: Summary) -> Finding | None:
    """Touching the threshold constantly is the stronger form of often being near it."""
    if summary.above_0_95 > CONSTANTLY:
        return Finding(
            "unstable",
            f"{_count(summary, summary.above_0_95)} were above 0.95 × max_norm.",
            f"Is the threshold too low for this model? The median norm is {summary.median:.3g}; if "
            "the loss falls all the same, max_norm may go up to where it catches a few steps in a "
            "hundred. If it does not fall, training is held by the clip alone: lower the learning "
            "rate or lengthen the warm-up.",
        )
    if summary.above_0_9 > OFTEN:
        return Finding(
            "high",
            f"{_count(summary, summary.above_0_9)} were above 0.9 × max_norm.",
            "This is a region of high gradients: look for bad samples in these batches, or lower "
            "the learning rate.",
        )
    return None


def _idle(summary: Summary) -> Finding | None:
    if summary.below_0_3 < 1.0:
        return None
    return Finding(
        "idle",
        f"All norms were below 0.3 × max_norm (median {summary.median:.3g}, largest "
        f"{summary.max:.3g} at step {summary.max_step}).",
        "Clipping has no effect here: max_norm can go down, so that it catches what stands out, "
        "or the learning rate up, 1.5 to 2 times.",
    )


def _count(summary: Summary, fraction: float) -> str:
    """Of steps, and the group or parameter that is clipped most often."""
    steps = f"{round(fraction * summary.window):,} of {summary.window:,} steps"
    if not summary.scopes:
        return steps
    most = summary.scopes[0]
    return f"{steps} (most often {most.name!r}, {most.clipped:.0%})"
