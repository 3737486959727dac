"""The measurements as a table on screen, in Markdown, as JSON and as a picture."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .markers import put_between_markers
from .measure import Case, Environment, HostCost, Result

_NAME = "bench"
BEGIN, END = f"<!-- {_NAME}:begin -->", f"<!-- {_NAME}:end -->"
_CASES = ("norm_only", "unclipped", "clipped")


@dataclass(frozen=True)
class Report:
    environment: Environment
    results: Sequence[Result]
    host_cost: dict[str, HostCost]  # "torch", "fusedclip"
    peak_extra_bytes: int | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        return cls(
            Environment(**data["environment"]),
            [
                Result(**{**result, **{name: Case(**result[name]) for name in _CASES}})
                for result in data["results"]
            ],
            {name: HostCost(**cost) for name, cost in data["host_cost"].items()},
            data["peak_extra_bytes"],
        )

    def notes(self) -> list[str]:
        """What stands below the table."""
        e = self.environment
        lines = [
            f"{e.device}, {e.threads} threads, torch {e.torch}, fusedclip {e.fusedclip} "
            f"(backend {e.backend}), Python {e.python}, {e.date}; load average beforehand "
            f"{e.load:.1f}."
        ]
        lines += [
            f"Host cost of {name}: {1e6 * cost.fixed:.0f} µs a call + "
            f"{1e6 * cost.per_tensor:.2f} µs a tensor."
            for name, cost in self.host_cost.items()
        ]
        if self.peak_extra_bytes is not None:
            lines.append(f"Peak extra memory of a call: {self.peak_extra_bytes / 1024:,.0f} KiB.")
        return lines


def screen_table(results: Sequence[Result]) -> Table:
    table = Table(title="ratio over torch, time (times the floor), bytes/s")
    table.add_column("gradients")
    for title in ("norm only", "not clipped", "clipped"):
        table.add_column(title, justify="right")
    for result in results:
        cells = (_screen_cell(getattr(result, name)) for name in _CASES)
        table.add_row(f"{result.workload}\n{_size(result)}", *cells)
    return table


def markdown(report: Report) -> str:
    lines = [
        "| gradients | | norm only | not clipped | clipped | torch → fusedclip, not clipped "
        "| × floor | clipped | × floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report.results:
        ratios = " | ".join(f"**{getattr(r, name).ratio:.1f}×**" for name in _CASES)
        times = " | ".join(
            f"{_time(c.torch)} → {_time(c.fusedclip)} | {_times_floor(c)}"
            for c in (r.unclipped, r.clipped)
        )
        lines.append(f"| {r.workload} | {_size(r)} | {ratios} | {times} |")
    return "\n".join([*lines, "", *report.notes()]) + "\n"


def tables(data: Mapping[str, Any]) -> dict[str, str]:
    """By marker, of what ``to_json`` wrote."""
    return {_NAME: markdown(Report.from_json(data))}


def plot_of(data: Mapping[str, Any], path: Path) -> None:
    plot(Report.from_json(data), path)


def write_markdown(report: Report, path: Path) -> None:
    """Put the table between the two markers of ``path``; without them it is the whole file."""
    table = markdown(report)
    if path.exists() and BEGIN in path.read_text():
        put_between_markers(path, _NAME, table)
    else:
        path.write_text(table)


def plot(report: Report, path: Path) -> None:
    """How much faster than torch, one group of bars a workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(reversed(report.results))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.7 * len(rows)), layout="constrained")
    height = 0.38
    for offset, name, label, color in (
        (height / 2, "unclipped", "norm below the threshold", "tab:green"),
        (-height / 2, "clipped", "norm above the threshold", "tab:blue"),
    ):
        places = [i + offset for i in range(len(rows))]
        bars = axes.barh(
            places, [getattr(r, name).ratio for r in rows], height, label=label, color=color
        )
        axes.bar_label(bars, fmt="%.1f×", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{r.workload}\n{_size(r)}" for r in rows])
    axes.set_xlabel("times as fast as torch.nn.utils.clip_grad_norm_")
    axes.set_title(report.notes()[0], fontsize=8)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _screen_cell(case: Case) -> str:
    return (
        f"[bold]{case.ratio:.1f}×[/bold]\n{_time(case.fusedclip)} ({_times_floor(case)}), "
        f"{case.bandwidth / 1e9:.1f} GB/s"
    )


def _times_floor(case: Case) -> str:
    """Below a few hundred microseconds the host's work dominates and the floor says nothing."""
    return f"{case.over_floor:.2f}" if case.floor > 2e-4 else "-"


def _size(result: Result) -> str:
    short = result.dtype.replace("float", "fp").replace("bfp", "bf")
    return f"{_bytes(result.bytes)} {short}, {result.tensors:,} tensors"


def _bytes(count: int) -> str:
    for unit, size, digits in (("GB", 10**9, 1), ("MB", 10**6, 0), ("KB", 10**3, 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} B"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"
