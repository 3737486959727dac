"""What ``make gpu`` measured, for docs/benchmarks.md: a table for each device, and the roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .section import size, time

NOTHING = (
    "No GPU has run this version yet, so there is no figure here. `make gpu`, on a machine with "
    "one, writes a file for `bench/results/`, and this table and the roofline are made of it.\n"
)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Times on the device, from event to event; percent of what the yardsticks allow."""
    if not results:
        return NOTHING
    parts = []
    for result in results:
        rows = result["results"]
        names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
        where = result["environment"]
        read, copy = (result["yardsticks"][name] / 1e12 for name in ("read", "copy"))
        gpu = where["gpu"]
        lines = [
            f"**{where['device']}**, torch {where['torch']}, Python {where['python']}, "
            f"driver {gpu['driver'] or 'unknown'}, {where['date']}; torch's sum reads {read:.2f} "
            f"TB/s, its copy moves {copy:.2f} TB/s.",
            "",
            "| gradients | over torch, wall time | " + " | ".join(names) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for row in rows:
            cells = " | ".join(_cell(row, name) for name in names)
            lines.append(
                f"| {row['workload']}, {size(row['bytes'])}, {row['case']} "
                f"| **{row['ratios']['fusedclip']:.1f}×** | {cells} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bytes/s over bytes, the yardsticks and each contestant, a panel for each device."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, result in enumerate(results):
        axes = figure.add_subplot(len(results), 1, number + 1)
        rows = sorted(result["results"], key=lambda row: float(row["bytes"]))
        for name in dict.fromkeys(name for row in rows for name in row["timings"]):
            for case, line in (("not clipped", "-"), ("clipped", "--")):
                own = [r for r in rows if r["case"] == case and name in r["timings"]]
                axes.plot(
                    [row["bytes"] for row in own],
                    [row["moved"] / row["timings"][name]["device"] / 1e9 for row in own],
                    f"o{line}", markersize=4,
                    label=f"{name}, {case}",
                )  # fmt: skip
        for name, line in (("read", "-"), ("copy", "--")):
            rate = result["yardsticks"][name] / 1e9
            axes.axhline(rate, color="black", linestyle=line, linewidth=1, label=f"torch's {name}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bytes of gradients")
        axes.set_ylabel("GB/s, of the fewest bytes that have to move")
        axes.set_title(result["environment"]["device"])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _cell(row: Mapping[str, Any], name: str) -> str:
    timing = row["timings"].get(name)
    if timing is None:
        return "-"
    return f"{time(timing['device'])} ({row['fractions'][name]:.0%})"
