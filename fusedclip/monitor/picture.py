"""The remembered steps as a picture: norms, threshold, coefficients, and a heat map of layers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.monitor.history import Steps
from fusedclip.monitor.summary import name_of

_MOST_ROWS = 40  # of the heat map, as many as can be read
_COLORS = colormaps["magma"].with_extremes(bad="tab:purple", under="black")
_FEWEST_ROWS = 8  # with fewer layers, one more component of the names is compared


def draw(
    steps: Steps, names: Sequence[str] | None, path: Path, segments: Sequence[str] | None = None
) -> None:
    """Write the picture to ``path``; its suffix says in which format."""
    figure = make_figure(steps, names, segments)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def make_figure(
    steps: Steps, names: Sequence[str] | None, segments: Sequence[str] | None = None
) -> Figure:
    """Norms at the top, then coefficients, then the norms of layers where they are known."""
    rows = steps.tensor_norms
    known = rows is not None and bool((rows > 0.0).any())
    figure = Figure(figsize=(10, 8 if known else 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        3 if known else 2, 1, sharex=True, height_ratios=(3, 1, 3.2) if known else (3, 1)
    )
    x = torch.arange(steps.first, steps.first + len(steps.norms), device="cpu")
    _draw_norms(panels[0], x, steps)
    _draw_coefficients(panels[1], x, steps)
    _name_the_clipped(panels[1], steps, segments)
    if known and rows is not None:
        _draw_layers(figure, panels[2], x, rows, names)
    panels[-1].set_xlabel("step")
    if panels[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_norms(axes: Axes, x: Tensor, steps: Steps) -> None:
    norms, limits = steps.norms, steps.thresholds
    finite = norms.isfinite()
    axes.plot(x, norms.where(finite, torch.nan), color="tab:blue", linewidth=1.1, zorder=3)
    if bool(limits.isfinite().any()):
        limit = limits.where(limits.isfinite(), torch.nan)
        axes.plot(x, limit, color="black", linestyle="--", linewidth=1, label="max_norm")
        axes.fill_between(x.numpy(), 0.9 * limit.numpy(), limit.numpy(), color="tab:orange",
                          alpha=0.3, linewidth=0, label="0.9 to 1 × max_norm")  # fmt: skip
        axes.plot(x, 0.3 * limit, color="tab:gray", linestyle=":", linewidth=1.2,
                  label="0.3 × max_norm: below, no effect")  # fmt: skip
    clipped = finite & (reference.coefficient(norms, limits) < 1.0)
    if bool(clipped.any()):
        axes.scatter(x[clipped], norms[clipped], s=8, color="tab:red", zorder=4,
                     label=f"clipped: {int(clipped.sum())} of {len(x)} steps")  # fmt: skip
    if bool(steps.skipped.any()):
        out = steps.skipped & finite
        axes.scatter(x[out], norms[out], s=22, marker="x", color="black", zorder=5,
                     label=f"left out: {int(steps.skipped.sum())} steps")  # fmt: skip
    for number, step in enumerate(x[~finite].tolist()):
        axes.axvline(step, color="tab:purple", linewidth=1, label="" if number else "NaN or inf")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("gradient norm")
    axes.grid(alpha=0.25)


def _draw_coefficients(axes: Axes, x: Tensor, steps: Steps) -> None:
    coefficients = reference.coefficient(steps.norms, steps.thresholds)
    axes.fill_between(
        x.numpy(), coefficients.numpy(), 1.0, color="tab:red", alpha=0.35, linewidth=0, step="mid"
    )
    axes.step(x, coefficients, where="mid", color="tab:red", linewidth=0.9)
    axes.set_ylim(0.0, 1.05)
    axes.set_ylabel("coefficient")
    axes.grid(alpha=0.25)


def _name_the_clipped(axes: Axes, steps: Steps, segments: Sequence[str] | None) -> None:
    """The groups or parameters that are clipped most often."""
    if steps.segment_norms is None or steps.segment_thresholds is None:
        return
    clipped = reference.coefficient(steps.segment_norms, steps.segment_thresholds) < 1.0
    often = clipped.double().mean(0)
    order = often.argsort(descending=True, stable=True)[:3].tolist()
    most = [f"{name_of(segments, i, 'segments')} {often[i]:.0%}" for i in order if often[i] > 0.0]
    if most:
        axes.set_title("clipped most often: " + ", ".join(most), fontsize=10, loc="left")


def _draw_layers(
    figure: Figure, axes: Axes, x: Tensor, rows: Tensor, names: Sequence[str] | None
) -> None:
    count = rows.shape[1]
    every_name = [name_of(names, i) for i in range(count)]
    labels, group = layers(every_name)
    squares = rows.new_zeros(len(rows), len(labels))
    squares.index_add_(1, torch.tensor(group, device="cpu"), rows.square())
    image = squares.sqrt().T
    edges = torch.arange(x[0].item(), x[-1].item() + 2, device="cpu") - 0.5
    shown = image[image.isfinite() & (image > 0.0)]
    image = image.where(image.isfinite(), torch.nan).clamp(min=shown.min().item())
    some = shown[:: 1 + shown.numel() // 1_000_000]  # quantile() takes so many
    low, high = torch.quantile(some, 0.02).item(), shown.max().item()
    scale = LogNorm(min(low, high / 2), high)
    lines = torch.arange(len(labels) + 1, device="cpu") - 0.5
    mesh = axes.pcolormesh(
        edges.numpy(), lines.numpy(), image.numpy(), norm=scale, cmap=_COLORS, rasterized=True
    )
    figure.colorbar(mesh, ax=axes, label="norm", pad=0.01)
    axes.set_yticks(range(len(labels)), labels, fontsize=8 if len(labels) <= 24 else 6)
    axes.invert_yaxis()
    largest = int(rows.where(rows.isfinite(), -1.0).argmax())
    step, place = divmod(largest, count)
    axes.set_title(
        f"largest: {every_name[place]}, {rows[step, place].item():.3g} at step {int(x[step])}",
        fontsize=10, loc="left",
    )  # fmt: skip


def layers(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Parameters as layers, few enough to be read: (label of each layer, layer of each parameter).

    A layer is all parameters whose names begin with the same components. As many components are
    compared as give at most 40 layers. Where that gives fewer than 8 layers (a long stack under one
    name), one component more is compared, and neighbouring layers are joined into 40 instead.
    """
    split = [name.split(".") for name in names]
    depths = range(max(len(parts) for parts in split), 0, -1)
    grouped = [[".".join(parts[:depth]) for parts in split] for depth in depths]  # finest first
    last = len(grouped) - 1
    chosen = next((i for i, each in enumerate(grouped) if len(set(each)) <= _MOST_ROWS), last)
    if chosen > 0 and len(set(grouped[chosen])) < _FEWEST_ROWS:
        chosen -= 1
    each = grouped[chosen]
    unique = list(dict.fromkeys(each))
    rows = min(_MOST_ROWS, len(unique))
    row_of = {label: i * rows // len(unique) for i, label in enumerate(unique)}
    members: list[list[str]] = [[] for _ in range(rows)]
    for label, row in row_of.items():
        members[row].append(label)
    labels = [m[0] if len(m) == 1 else f"{m[0]} … {m[-1]}" for m in members]
    return labels, [row_of[label] for label in each]
