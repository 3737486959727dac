"""The log line, and where numbers go: ``logging``, TensorBoard, CSV, JSON lines.

A sink is a function that is called with the number of a step and its numbers by name. A function
that takes a dict needs no sink: ``wandb.log(monitor.metrics(), step=step)``.
"""

import csv
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Sink = Callable[[int, Mapping[str, float]], None]


def format_line(
    step: int,
    *,
    loss: float | None = None,
    grad_norm: float | None = None,
    lr: float | None = None,
) -> str:
    """``[Train Step 123] loss=2.14, grad_norm=0.97, lr=2e-5``, without what is not known."""
    parts = []
    if loss is not None:
        parts.append(f"loss={_short(loss)}")
    if grad_norm is not None:
        parts.append(f"grad_norm={_short(grad_norm)}")
    if lr is not None:
        parts.append(f"lr={_general(lr)}")
    return f"[Train Step {step}] " + ", ".join(parts)


def to_logging(logger: logging.Logger | None = None, level: int = logging.INFO) -> Sink:
    """The log line of each step through ``logging``; by default the logger ``fusedclip``."""
    target = logging.getLogger("fusedclip") if logger is None else logger

    def sink(step: int, values: Mapping[str, float]) -> None:
        known = {name: values.get(name) for name in ("loss", "grad_norm", "lr")}
        target.log(level, "%s", format_line(step, **known))

    return sink


def to_tensorboard(writer: Any) -> Sink:
    """Each number as a scalar, to an object with the ``add_scalar`` of TensorBoard's writer."""

    def sink(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return sink


def to_csv(path: str | Path) -> Sink:
    """A row a step, appended; the columns are those of the file, or of its first step.

    Raises:
        ValueError: at a step with a number that has no column.
    """
    file = Path(path)

    def sink(step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **values}
        new = not file.exists() or file.stat().st_size == 0
        columns = list(row)
        if not new:
            with file.open(newline="") as stream:
                columns = next(csv.reader(stream))
        unknown = [name for name in row if name not in columns]
        if unknown:
            raise ValueError(
                f"{file}: expected numbers for its columns {columns}, got {unknown} too; "
                "log the same numbers at each step, or to another file"
            )
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            if new:
                writer.writeheader()
            writer.writerow(row)

    return sink


def to_jsonl(path: str | Path) -> Sink:
    """Appends a JSON object a line; NaN and infinities, which JSON does not have, are strings."""
    file = Path(path)

    def sink(step: int, values: Mapping[str, float]) -> None:
        known = {name: x if math.isfinite(x) else str(x) for name, x in values.items()}
        with file.open("a") as stream:
            stream.write(json.dumps({"step": step, **known}) + "\n")

    return sink


def _short(value: float) -> str:
    """Two decimals, and what they cannot show in general form."""
    if value == 0.0 or 0.01 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.2f}"
    return _general(value)


def _general(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
