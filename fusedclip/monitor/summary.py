"""What the remembered steps looked like, in numbers and as a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.monitor.history import History

_TOP = 5  # contributors that are named


@dataclass(frozen=True)
class Contributor:
    """A parameter and its part in a norm."""

    name: str
    norm: float
    share: float  # of the squared norm of all, in [0, 1]


@dataclass(frozen=True)
class Summary:
    """Statistics of norms before clipping. Fractions are of the steps that are remembered."""

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


def summarize(history: History, names: Sequence[str] | None) -> Summary:
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
    )


def name_of(names: Sequence[str] | None, index: int) -> str:
    return names[index] if names is not None and index < len(names) else f"parameters[{index}]"


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
