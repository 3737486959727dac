"""Cost against the number of tensors and against bytes: ``python -m bench.sweep``.

torch's clip and fusedclip's in turn on fp32 lists, medians of one run, and the floor: one read of
as many bytes when nothing is clipped, one read and one read-and-write when something is.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedclip

from .measure import side_by_side
from .section import Section, conditions, footer, main, size, time
from .workloads import Workload, equal

_CPU = torch.device("cpu")
COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000, 20_000)  # tensors of 4 KB
BYTES = (64 << 10, 1 << 20, 16 << 20, 128 << 20, 512 << 20, 2 << 30)  # in 100 tensors
_CASES = ("unclipped", "clipped")


def measure(seconds: float) -> dict[str, Any]:
    where = conditions()
    return {
        "environment": where,
        "by_tensors": [point(equal(count, 1024), seconds) for count in COUNTS],
        "by_bytes": [point(equal(100, total // 400), seconds) for total in BYTES],
    }


def point(workload: Workload, seconds: float) -> dict[str, Any]:
    parameters = workload.parameters(_CPU)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.randn(workload.elements)
    norm = float(fusedclip.get_total_norm(grads))

    def compare(limit: float, restore: float) -> tuple[float, float]:
        def undo() -> None:
            if restore != 1.0:
                torch._foreach_mul_(grads, restore)

        return side_by_side(
            (
                lambda: nn.utils.clip_grad_norm_(parameters, limit),
                lambda: fusedclip.clip_(parameters, limit),
            ),
            undo, _CPU, seconds / 3,
        )[0]  # fmt: skip

    (read, write), _ = side_by_side(
        (flat.sum, lambda: flat.mul_(0.9999)), lambda: None, _CPU, seconds / 3
    )
    point: dict[str, Any] = {"tensors": len(parameters), "bytes": workload.bytes}
    for case, times in zip(_CASES, (compare(2 * norm, 1.0), compare(norm / 2, 2.0)), strict=True):
        point[case] = {"torch": times[0], "fusedclip": times[1]}
    point["unclipped"]["floor"], point["clipped"]["floor"] = read, read + write
    return point


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    made = {}
    for name in ("by_tensors", "by_bytes"):
        lines = [
            "| gradients, fp32 | not clipped: torch → fusedclip | | floor "
            "| clipped: torch → fusedclip | | floor |",
            "|---|---|---|---|---|---|---|",
        ]
        for point in result[name]:
            cells = " | ".join(
                f"{time(c['torch'])} → {time(c['fusedclip'])} | "
                f"**{c['torch'] / c['fusedclip']:.1f}×** | {time(c['floor'])}"
                for c in (point[case] for case in _CASES)
            )
            lines.append(f"| {size(point['bytes'])} in {point['tensors']:,} tensors | {cells} |")
        made[f"sweep-{name.replace('_', '-')}"] = (
            "\n".join([*lines, "", footer(result["environment"])]) + "\n"
        )
    return made


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Both sweeps, logarithmic, with the floor drawn in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, name, key, label in (
        (panels[0], "by_tensors", "tensors", "tensors of 4 KB"),
        (panels[1], "by_bytes", "bytes", "bytes in 100 tensors"),
    ):
        points: Sequence[Mapping[str, Any]] = result[name]
        x = [point[key] for point in points]
        for case, line in (("unclipped", "-"), ("clipped", "--")):
            what = "not clipped" if case == "unclipped" else "clipped"
            for who, color in (
                ("torch", "tab:blue"),
                ("fusedclip", "tab:green"),
                ("floor", "gray"),
            ):
                axes.plot(
                    x, [1e3 * point[case][who] for point in points], line, color=color,
                    marker="" if who == "floor" else "o", markersize=4,
                    linewidth=1.0 if who == "floor" else 1.6, label=f"{who}, {what}",
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("ms a call")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(footer(result["environment"]), fontsize=9)
    figure.savefig(path, dpi=130)


SECTION = Section("sweep", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
