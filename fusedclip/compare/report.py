"""What a comparison shows: progress, log lines, a closing table, a picture and a JSON file."""

import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusedclip.compare import (
    ARMS,
    Clip,
    Comparison,
    History,
    Settings,
    Train,
    compare,
)
from fusedclip.compare.history import ALIKE, apart_at
from fusedclip.monitor import Advice, Monitor
from fusedclip.monitor.sinks import format_line

_LOG_EVERY = 25  # steps
_TRIED = 10  # after so many steps the time of all is known
_CONTROL = {"color": "tab:red", "linewidth": 1.5}
_LAST = {"color": "tab:green", "linewidth": 1.2}
_BETWEEN = {"color": "tab:blue", "linewidth": 3.5, "alpha": 0.45}  # the last lies on top of it


def run(
    train: Train,
    settings: Settings,
    out: Path,
    console: Console,
    *,
    name: str = "compare",
    title: str = "",
    arms: Mapping[str, Clip | None] = ARMS,
) -> Comparison:
    """Compare, print as it goes, then the table; writes ``name.png`` and ``name.json``."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = {arm: progress.add_task(arm, total=settings.steps, start=False) for arm in arms}

        begin, reported = time.perf_counter(), itertools.count(1)

        def show(history: History) -> None:
            step = len(history.losses) - 1
            if step == 0:
                progress.start_task(tasks[history.arm])
            progress.advance(tasks[history.arm])
            if next(reported) == _TRIED:
                a_step = (time.perf_counter() - begin) / _TRIED
                console.print(_announced(len(arms), settings.steps, a_step), highlight=False)
            if step % _LOG_EVERY == 0 or history.diverged_at is not None:
                line = format_line(
                    step, loss=history.losses[-1], grad_norm=history.norms[-1], lr=history.rates[-1]
                )
                named = f"{history.arm:<{max(map(len, arms))}} {line}"
                console.print(named, highlight=False, markup=False)

        comparison = compare(train, settings, arms, show)
    if comparison.interrupted:
        console.print("Interrupted: this is what there is.")
    if comparison.arms:
        console.print(table(comparison, title))
        if len(comparison.arms) > 2:
            console.print(parting(comparison), highlight=False)
        console.print(comparison.verdict(), highlight=False)
        if comparison.arms[-1].max_norm < math.inf:
            console.print(str(advice(comparison.arms[-1])), highlight=False, markup=False)
        out.mkdir(parents=True, exist_ok=True)
        plot(comparison, title).savefig(out / f"{name}.png", dpi=130)
        (out / f"{name}.json").write_text(json.dumps(as_dict(comparison), indent=1) + "\n")
        console.print(f"Picture: {out / f'{name}.png'}", soft_wrap=True)
        console.print(f"Figures: {out / f'{name}.json'}", soft_wrap=True)
    return comparison


def _announced(arms: int, steps: int, seconds: float) -> str:
    total = arms * steps * seconds
    shown = f"{total:.0f} seconds" if total < 100 else f"{total / 60:.0f} minutes"
    return f"{arms} arms of {steps} steps, one after the other: at most about {shown} here."


def table(comparison: Comparison, title: str = "") -> Table:
    threshold = f"max_norm={comparison.settings.max_norm:g}"
    result = Table(title=f"{title}, {threshold}" if title else threshold)
    result.add_column("arm")
    for name in ("final loss", "worst spike", "steps clipped", "a clip, median"):
        result.add_column(name, justify="right")
    for history in comparison.arms:
        steps = len(history.losses)
        loss = f"{history.final_loss:.2f}"
        if history.diverged_at is not None:
            loss = f"{_what(history)} at step {history.diverged_at}"
        clips = history.max_norm < math.inf
        result.add_row(
            history.arm,
            loss,
            "-" if history.diverged_at is not None else f"+{history.worst_spike:.3g}",
            f"{history.steps_clipped} of {steps}" if clips else "-",
            f"{1e6 * history.median_clip_seconds:.0f} µs"
            if clips and history.clip_seconds
            else "-",
        )
    return result


def parting(comparison: Comparison) -> str:
    """Up to which step the last two arms, which both clip, have the same losses."""
    one, other = comparison.arms[-2:]
    step = apart_at(one.losses, other.losses)
    alike = f"The losses of {one.arm!r} and {other.arm!r} are the same to {ALIKE:.1%} "
    if step is None:
        return f"{alike}at all steps."
    return (
        f"{alike}up to step {step}. From there on their last bits have grown into two runs, as in "
        "any training: compare how they end, not single steps."
    )


def advice(history: History) -> Advice:
    """What a Monitor would have said of an arm."""
    monitor = Monitor(history.max_norm, window=len(history.norms))
    for norm in history.norms:
        monitor.update(norm)
    return monitor.advice()


def plot(comparison: Comparison, title: str = "") -> Figure:
    """Loss and gradient norm over steps, one line an arm."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for history, style in zip(comparison.arms, _styles(len(comparison.arms)), strict=True):
        top.plot(history.losses, label=history.arm, **style)
        bottom.plot(history.norms, **style)
        if history.diverged_at is not None:
            top.annotate(
                f"{history.arm}: {_what(history)} at step {history.diverged_at}",
                xy=(history.diverged_at, 0.9),
                xycoords=("data", "axes fraction"),
                color=style["color"],
            )
    # An arm that diverges leaves through the top instead of flattening the others.
    leaves = any(history.diverged_at is not None for history in comparison.arms)
    top.set_ylim(*_range(comparison, "losses", 0.9, 1.35 if leaves else 1.05))
    bottom.set_ylim(*_range(comparison, "norms", 0.5, 8 if leaves else 2))
    bottom.set_yscale("log")
    limit = comparison.settings.max_norm
    bottom.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"max_norm = {limit:g}")
    top.set_ylabel("loss")
    bottom.set_ylabel("gradient norm before clipping")
    bottom.set_xlabel("step")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything for JSON; what is not finite is null, as JSON has no word for it."""
    last = comparison.arms[-1]
    arms = []
    for history in comparison.arms:
        arms.append(
            {
                "arm": history.arm,
                "max_norm": _finite(history.max_norm),
                "final_loss": _finite(history.final_loss),
                "worst_spike": history.worst_spike,
                "steps_clipped": history.steps_clipped,
                "diverged_at": history.diverged_at,
                "apart_from_the_last_arm_at": apart_at(history.losses, last.losses),
                "median_clip_seconds": _finite(history.median_clip_seconds),
                "losses": [_finite(x) for x in history.losses],
                "norms": [_finite(x) for x in history.norms],
                "rates": history.rates,
            }
        )
    settings = comparison.settings
    return {
        "max_norm": settings.max_norm,
        "steps": settings.steps,
        "seed": settings.seed,
        "device": settings.device,
        "interrupted": comparison.interrupted,
        "begin_alike": comparison.begin_alike,
        "verdict": comparison.verdict(),
        "arms": arms,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _what(history: History) -> str:
    return "NaN" if math.isnan(history.losses[-1]) else "inf"


def _styles(count: int) -> list[dict[str, Any]]:
    return [_CONTROL, *[_BETWEEN] * (count - 2), _LAST][:count]


def _range(comparison: Comparison, name: str, below: float, above: float) -> tuple[float, float]:
    """The axis: what the arms that stayed finite need, and where all of them began."""
    stable = [x for h in comparison.arms if h.diverged_at is None for x in getattr(h, name)]
    values = stable + [getattr(h, name)[0] for h in comparison.arms]
    finite = [x for x in values if math.isfinite(x) and x > 0] or [1.0]
    return below * min(finite), above * max(finite)
