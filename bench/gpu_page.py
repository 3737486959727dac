"""What ``make gpu`` measured, for docs/benchmarks.md: a table for each device, and the roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .section import size, time

NOTHING = (
    "No GPU has run this version yet, so there is no figure here. `make gpu`, on a machine with "
    "one, leaves its file in `bench/results/`, and this table and the roofline are made of it.\n"
)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Times on the device, from event to event, and the share of a copy's bandwidth."""
    if not results:
        return NOTHING
    parts = []
    for result in results:
        rows = result["results"]
        names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
        where = result["environment"]
        bandwidth = rows[0]["copy_bandwidth"]
        lines = [
            f"**{where['device']}**, torch {where['torch']}, Python {where['python']}, "
            f"{where['date']}; a copy moves {bandwidth / 1e12:.2f} TB/s.",
            "",
            "| gradients | over torch, wall time | " + " | ".join(names) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for row in rows:
            wall = {name: timing["wall"] for name, timing in row["timings"].items()}
            cells = " | ".join(_cell(row, name) for name in names)
            clipped = "clipped" if row["clipped"] else "not clipped"
            lines.append(
                f"| {row['workload']}, {size(row['bytes'])}, {clipped} "
                f"| **{wall['torch'] / wall['fusedclip']:.1f}×** | {cells} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bytes/s over bytes, the copy's bandwidth and each contestant, a panel for each device."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, result in enumerate(results):
        axes = figure.add_subplot(len(results), 1, number + 1)
        rows = sorted(result["results"], key=lambda row: float(row["bytes"]))
        for name in dict.fromkeys(name for row in rows for name in row["timings"]):
            for clipped, line in ((False, "-"), (True, "--")):
                own = [r for r in rows if r["clipped"] == clipped and name in r["timings"]]
                axes.plot(
                    [row["bytes"] for row in own],
                    [row["moved"] / row["timings"][name]["device"] / 1e9 for row in own],
                    f"o{line}", markersize=4,
                    label=f"{name}, {'clipped' if clipped else 'not clipped'}",
                )  # fmt: skip
        axes.axhline(rows[0]["copy_bandwidth"] / 1e9, color="black", linewidth=1, label="a copy")
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
    share = row["moved"] / timing["device"] / row["copy_bandwidth"]
    return f"{time(timing['device'])} ({share:.0%})"
