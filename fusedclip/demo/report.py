"""What the demonstration shows: progress, log lines, the closing table and the picture."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from fusedclip.demo.training import ARMS, History, Settings, learning_rate, log_line, train

_LOG_EVERY = 25  # steps
_STYLES = {
    "no clipping": {"color": "tab:red", "linewidth": 1.5},
    "torch": {"color": "tab:blue", "linewidth": 3.5, "alpha": 0.45},
    "fusedclip": {"color": "tab:green", "linewidth": 1.2},
}


def run(settings: Settings, text: Tensor, out: Path, console: Console) -> bool:
    """Train all arms, print the table, draw the picture. False when it was interrupted."""
    histories: list[History] = []
    finished = True
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            for arm in ARMS:
                history = History(arm)
                histories.append(history)
                task = progress.add_task(arm, total=settings.steps)

                def show(step: int, history: History = history, task: object = task) -> None:
                    progress.advance(task)  # type: ignore[arg-type]
                    if step % _LOG_EVERY == 0 or history.diverged_at is not None:
                        console.print(_line(settings, history, step), highlight=False)

                train(arm, text, settings, history, show)
    except KeyboardInterrupt:
        finished = False
        console.print("Interrupted: this is what there is.")
    histories = [history for history in histories if history.losses]
    if histories:
        console.print(table(histories, settings))
        path = out / "demo.png"
        plot(histories, settings, path)
        console.print(f"Picture: {path}", soft_wrap=True)
    return finished


def table(histories: Sequence[History], settings: Settings) -> Table:
    result = Table(title=f"max_norm={settings.max_norm:g}, lr={settings.lr:g}")
    result.add_column("arm")
    for title in ("final loss", "worst spike", "steps clipped", "time in clipping"):
        result.add_column(title, justify="right")
    for history in histories:
        steps = len(history.losses)
        clips = history.arm != "no clipping"
        loss = f"{history.final_loss:.2f}"
        if history.diverged_at is not None:
            loss = f"NaN at step {history.diverged_at}"
        result.add_row(
            history.arm,
            loss,
            f"+{history.worst_spike:.3g}",
            f"{history.steps_above(settings.max_norm)} of {steps}" if clips else "-",
            f"{1e6 * history.clip_seconds / steps:.0f} µs a step" if clips else "-",
        )
    return result


def plot(histories: Sequence[History], settings: Settings, path: Path) -> None:
    """Loss and gradient norm over steps, one line an arm, written to ``path``."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for history in histories:
        style = _STYLES[history.arm]
        top.plot(history.losses, label=history.arm, **style)
        bottom.plot(history.norms, **style)
        if history.diverged_at is not None:
            top.annotate(
                f"{history.arm}: NaN at step {history.diverged_at}",
                xy=(history.diverged_at, 0.9),
                xycoords=("data", "axes fraction"),
                color=style["color"],
            )
    # An arm that diverges leaves through the top instead of flattening the others.
    top.set_ylim(*_range(histories, "losses", 0.9, 1.35))
    bottom.set_ylim(*_range(histories, "norms", 0.5, 8))
    bottom.set_yscale("log")
    threshold = f"max_norm = {settings.max_norm:g}"
    bottom.axhline(settings.max_norm, color="black", linestyle="--", linewidth=1, label=threshold)
    top.set_ylabel("loss")
    bottom.set_ylabel("gradient norm before clipping")
    bottom.set_xlabel("step")
    figure.suptitle(f"A small transformer learns Python's own sources: SGD, lr {settings.lr:g}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _range(
    histories: Sequence[History], name: str, below: float, above: float
) -> tuple[float, float]:
    """The axis: what the arms that stayed finite need, and where all of them began."""
    stable = [x for h in histories if h.diverged_at is None for x in getattr(h, name)]
    values = stable + [getattr(h, name)[0] for h in histories]
    finite = [x for x in values if math.isfinite(x) and x > 0] or [1.0]
    return below * min(finite), above * max(finite)


def _line(settings: Settings, history: History, step: int) -> str:
    lr = learning_rate(settings, step)
    return log_line(step, history.losses[-1], history.norms[-1], lr)
