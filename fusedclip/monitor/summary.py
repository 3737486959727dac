"""What the remembered steps looked like, in numbers and as a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.monitor.history import History, Steps

_TOP = 5  # contributors that are named


@dataclass(frozen=True)
class Contributor:
    """A parameter and its part in a norm."""

    name: str
    norm: float
    share: float  # of the squared norm of all, in [0, 1]


@dataclass(frozen=True)
class Scope:
    """A group or parameter that is clipped by its own norm."""

    name: str
    clipped: float  # of the steps that are remembered
    mean_coefficient: float
    median: float  # of its finite norms
    max_norm: float  # of the last step


@dataclass(frozen=True)
class Summary:
    """Statistics of norms before clipping. Fractions are of the steps that are remembered.

    Where groups or parameters are clipped by their own norms, the norm of a step is that of the one
    that was most above its threshold, or nearest to it.
    """

    steps: int  # of the run; 0: there is nothing to say, and all numbers below are NaN
    window: int  # how many of them are remembered
    max_norm: float  # of the last step
    last_norm: float
    last_coefficient: float
    median: float  # of the finite norms, as p95
    p95: float
    max: float  # the largest finite norm and …
    max_step: int  # … when it was; -1: none was finite
    clipped: float  # coefficient < 1
    below_0_3: float  # norm < 0.3·threshold
    above_0_9: float
    above_0_95: float
    mean_coefficient: float  # over the steps with a finite norm
    nonfinite_steps: int  # of the run
    nonfinite_recently: int  # of those remembered
    top: tuple[Contributor, ...]  # at `max_step`, the largest first; empty where not known
    typical: float  # the median norm of the parameters at that step
    nonfinite_step: int  # the last one remembered; -1: none
    nonfinite_names: tuple[str, ...]  # the parameters whose norm was NaN or infinite then
    skipped_steps: int  # of the run: left out
    skipped_recently: int  # of those remembered
    skipped_run: int  # the longest row of them that is remembered …
    skipped_run_step: int  # … and when it began; -1: none
    scopes: tuple[Scope, ...]  # those that were clipped, most often first; empty for a global norm

    def __str__(self) -> str:
        if not self.steps:
            return "No steps yet."
        last = f"the last {self.window:,} of " if self.window < self.steps else ""
        lines = [
            f"{last}{self.steps:,} steps, max_norm {self.max_norm:g}",
            f"  norm       median {self.median:.3g}, 95 % below {self.p95:.3g}, largest "
            f"{self.max:.3g} at step {self.max_step}",
            f"  clipped    {self.clipped:.1%} of the steps, mean coefficient "
            f"{self.mean_coefficient:.3g}",
            f"  threshold  {self.below_0_3:.1%} of the steps below 0.3 × max_norm, "
            f"{self.above_0_9:.1%} above 0.9 ×, {self.above_0_95:.1%} above 0.95 ×",
            f"  NaN, inf   {self.nonfinite_steps:,} steps" + self._culprits(),
        ]
        if self.skipped_steps:
            lines.append(
                f"  left out   {self.skipped_steps:,} steps, at most {self.skipped_run:,} in a row"
            )
        if self.scopes:
            lines.append("  clipped most often:")
            width = max(15, *(len(scope.name) for scope in self.scopes))
            lines += [
                f"    {scope.name:<{width}}  {scope.clipped:6.1%} of the steps, median norm "
                f"{scope.median:.3g}, max_norm {scope.max_norm:.3g}"
                for scope in self.scopes
            ]
        if self.top:
            lines.append(f"  step {self.max_step}, its largest parts:")
            width = max(15, *(len(part.name) for part in self.top))
            lines += [
                f"    {part.name:<{width}}  {part.norm:9.3g}  {part.share:6.1%} of the square"
                for part in self.top
            ]
            lines.append(f"    {'(median of all)':<{width}}  {self.typical:9.3g}")
        return "\n".join(lines)

    def _culprits(self) -> str:
        if self.nonfinite_step < 0:
            return ""
        names = ", ".join(self.nonfinite_names[:_TOP])
        more = len(self.nonfinite_names) - _TOP
        where = f" in {names}" + (f" and {more} more" if more > 0 else "") if names else ""
        return f", the last one {self.nonfinite_step}{where}"


def summarize(
    history: History, names: Sequence[str] | None, segments: Sequence[str] | None = None
) -> Summary:
    kept = history.remembered()
    norms, thresholds = kept.norms, kept.thresholds
    finite = norms.isfinite()
    coefficients = reference.coefficient(norms, thresholds)
    ratios = norms / thresholds
    bounded = finite & thresholds.isfinite()
    place = int(norms.where(finite, -1.0).argmax()) if len(norms) else 0
    bad = int((~finite).nonzero()[-1]) if not finite.all() else -1
    rows = kept.tensor_norms
    largest = None if rows is None or not finite.any() else rows[place]
    top, typical = _contributors(largest, names)
    run, run_begin = _longest_run(kept.skipped.tolist())
    return Summary(
        steps=history.steps,
        window=len(norms),
        max_norm=_last(thresholds),
        last_norm=_last(norms),
        last_coefficient=_last(coefficients),
        median=_quantile(norms[finite], 0.5),
        p95=_quantile(norms[finite], 0.95),
        max=norms[place].item() if finite.any() else math.nan,
        max_step=kept.first + place if finite.any() else -1,
        clipped=_fraction(finite & (coefficients < 1.0)),
        below_0_3=_fraction(bounded & (ratios < 0.3)),
        above_0_9=_fraction(bounded & (ratios > 0.9)),
        above_0_95=_fraction(bounded & (ratios > 0.95)),
        mean_coefficient=_mean(coefficients[finite]),
        nonfinite_steps=history.nonfinite_steps,
        nonfinite_recently=int((~finite).sum()),
        top=top,
        typical=typical,
        nonfinite_step=-1 if bad < 0 else kept.first + bad,
        nonfinite_names=_nonfinite(None if rows is None or bad < 0 else rows[bad], names),
        skipped_steps=history.skipped_steps,
        skipped_recently=int(kept.skipped.sum()),
        skipped_run=run,
        skipped_run_step=kept.first + run_begin if run else -1,
        scopes=_scopes(kept, segments),
    )


def _longest_run(flags: Sequence[bool]) -> tuple[int, int]:
    """How long the longest run of True is, and where it begins."""
    longest = begin = current = 0
    for i, flag in enumerate(flags):
        current = current + 1 if flag else 0
        if current > longest:
            longest, begin = current, i + 1 - current
    return longest, begin


def _scopes(kept: Steps, segments: Sequence[str] | None) -> tuple[Scope, ...]:
    norms, thresholds = kept.segment_norms, kept.segment_thresholds
    if norms is None or thresholds is None:
        return ()
    coefficients = reference.coefficient(norms, thresholds)
    clipped = coefficients < 1.0  # [steps, segments]; NaN where a step is of another kind
    often = clipped.double().mean(0)
    found = []
    for i in often.argsort(descending=True, stable=True)[:_TOP].tolist():
        if often[i] > 0.0:
            own, factors = norms[:, i], coefficients[:, i]
            median = _quantile(own[own.isfinite()], 0.5)
            mean = _mean(factors[factors.isfinite()])
            name = name_of(segments, i, "segments")
            found.append(Scope(name, often[i].item(), mean, median, _last(thresholds[:, i])))
    return tuple(found)


def name_of(names: Sequence[str] | None, index: int, what: str = "parameters") -> str:
    return names[index] if names is not None and index < len(names) else f"{what}[{index}]"


def _contributors(
    norms: Tensor | None, names: Sequence[str] | None
) -> tuple[tuple[Contributor, ...], float]:
    """The largest parts of a norm, and the median of all that are not 0."""
    if norms is None or not (norms > 0.0).any():
        return (), math.nan
    shares = (norms / norms.max()).square()  # of the largest: squares of large norms overflow
    shares = shares / shares.sum()
    order = norms.argsort(descending=True, stable=True)[:_TOP].tolist()
    top = tuple(
        Contributor(name_of(names, i), norms[i].item(), shares[i].item())
        for i in order
        if norms[i] > 0.0
    )
    return top, _quantile(norms[norms > 0.0], 0.5)


def _nonfinite(norms: Tensor | None, names: Sequence[str] | None) -> tuple[str, ...]:
    if norms is None or norms.isnan().all():  # all NaN: not known, or no one in particular
        return ()
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    return tuple(name_of(names, i) for i in bad)


def _last(values: Tensor) -> float:
    return values[-1].item() if len(values) else math.nan


def _quantile(values: Tensor, q: float) -> float:
    return torch.quantile(values, q).item() if len(values) else math.nan


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else math.nan


def _fraction(which: Tensor) -> float:
    return which.double().mean().item() if len(which) else math.nan
