"""What a Monitor writes: log lines, sinks, the picture."""

import csv
import json
import logging
import math
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.figure import Figure

from fusedclip.monitor import Monitor
from fusedclip.monitor.picture import layers, make_figure
from fusedclip.monitor.sinks import format_line, to_csv, to_jsonl, to_logging, to_tensorboard


def _trained(window: int = 512) -> Monitor:
    """40 steps of three layers; clipped at 7 and 30, NaN at 20, layer b explodes at 30."""
    monitor = Monitor(1.0, window, names=["a.w", "a.b", "b.w"])
    for step in range(40):
        row = torch.tensor([0.3, 0.1, 0.2])
        if step == 7:
            row *= 4
        if step == 30:
            row[2] = 9.0
        if step == 20:
            row[1] = math.nan
        monitor.update(row.norm(), row)
    return monitor


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((2.14, 0.97, 2e-5), "loss=2.14, grad_norm=0.97, lr=2e-5"),
        ((2.139, 0.966, 1.25e-4), "loss=2.14, grad_norm=0.97, lr=0.000125"),
        ((0.001, 12345.6, 3e-12), "loss=0.001, grad_norm=1.23e4, lr=3e-12"),
        ((math.nan, math.inf, 0.0), "loss=nan, grad_norm=inf, lr=0"),
        ((0.0, None, None), "loss=0.00"),
        ((None, 0.5, None), "grad_norm=0.50"),
    ],
)
def test_the_log_line(values: tuple[float | None, ...], line: str) -> None:
    loss, norm, lr = values
    assert format_line(123, loss=loss, grad_norm=norm, lr=lr) == f"[Train Step 123] {line}"


def test_a_monitor_knows_its_norm() -> None:
    monitor = Monitor(1.0)
    monitor.update(torch.tensor(0.97))
    expected = "[Train Step 123] loss=2.14, grad_norm=0.97, lr=2e-5"
    assert monitor.log_line(123, 2.14, 2e-5) == expected


def test_metrics_are_a_flat_dict() -> None:
    metrics = _trained().metrics("clip/")
    assert list(metrics) == [
        "clip/norm", "clip/max_norm", "clip/coefficient", "clip/median", "clip/p95",
        "clip/clipped_fraction", "clip/nonfinite_steps",
    ]  # fmt: skip
    assert all(type(value) is float for value in metrics.values())
    assert metrics["clip/clipped_fraction"] == 2 / 40 and metrics["clip/nonfinite_steps"] == 1.0


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(1.0, sinks=[to_logging(), to_logging(logging.getLogger("mine"), 10)])
    monitor.update(0.5)
    with caplog.at_level(logging.DEBUG):
        monitor.log(3, loss=1.5, lr=1e-3)
    line = "[Train Step 3] loss=1.50, grad_norm=0.50, lr=0.001"
    assert caplog.record_tuples == [("fusedclip", 20, line), ("mine", 10, line)]


class _Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = (value, step)


def test_tensorboard() -> None:
    writer = _Writer()
    monitor = Monitor(2.0, sinks=[to_tensorboard(writer)])
    monitor.update(4.0)
    monitor.log(7, loss=1.5)
    assert writer.scalars["loss"] == (1.5, 7)
    assert writer.scalars["grad_norm"] == writer.scalars["grad_clip/norm"] == (4.0, 7)
    assert writer.scalars["grad_clip/coefficient"][0] == pytest.approx(0.5)
    assert "lr" not in writer.scalars


def test_csv_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    for step in range(2):  # a sink of its own each time, as in a resumed run
        to_csv(file)(step, {"loss": 1.5 + step, "grad_norm": 0.5})
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [
        {"step": "0", "loss": "1.5", "grad_norm": "0.5"},
        {"step": "1", "loss": "2.5", "grad_norm": "0.5"},
    ]
    before = file.read_text()
    with pytest.raises(ValueError, match=r"log\.csv: expected numbers .* got \['lr'\] too"):
        to_csv(file)(2, {"loss": 1.0, "lr": 1e-3})
    assert file.read_text() == before


def test_jsonl_is_json(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    monitor = Monitor(1.0, sinks=[to_jsonl(file)])
    for step, norm in enumerate([0.5, math.nan]):
        monitor.update(norm)
        monitor.log(step, loss=2.0)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["grad_norm"] == 0.5 and lines[1]["grad_norm"] == "nan"


def _figure(monitor: Monitor) -> Figure:
    return make_figure(monitor._history.remembered(), monitor.names)


def test_the_picture_shows_what_was(tmp_path: Path) -> None:
    monitor = _trained()
    norms, coefficients, heat = _figure(monitor).axes[:3]
    line = norms.lines[0].get_ydata()
    assert numpy.isnan(line[20]) and line[30] == pytest.approx(math.hypot(0.3, 0.1, 9.0))
    assert norms.lines[0].get_xdata()[0] == 0 and len(line) == 40
    assert (norms.lines[1].get_ydata() == 1.0).all()  # the threshold, and 0.3 of it
    assert norms.lines[2].get_ydata() == pytest.approx(numpy.full(40, 0.3))
    (points,) = [c for c in norms.collections if len(c.get_offsets()) == 2]
    assert points.get_offsets()[:, 0].tolist() == [7, 30]
    labels = [text.get_text() for text in norms.figure.legends[0].get_texts()]
    assert "clipped: 2 of 40 steps" in labels and "NaN or inf" in labels
    assert norms.get_yscale() == "log"
    assert numpy.nanmin(coefficients.lines[0].get_ydata()) == pytest.approx(1 / 9.006, rel=1e-3)
    image = heat.collections[0].get_array()
    assert numpy.unravel_index(numpy.nanargmax(image), image.shape) == (2, 30)
    assert numpy.ma.masked_invalid(image).mask[1, 20]
    assert [text.get_text() for text in heat.get_yticklabels()] == ["a.w", "a.b", "b.w"]
    assert heat.get_title("left") == "largest: b.w, 9 at step 30"
    for name in ("picture.png", "picture.svg"):
        monitor.plot(tmp_path / "new folder" / name)
        assert (tmp_path / "new folder" / name).stat().st_size > 10_000


def test_a_later_window_keeps_its_step_numbers() -> None:
    norms, _, heat = _figure(_trained(window=15)).axes[:3]
    assert norms.lines[0].get_xdata().tolist() == list(range(25, 40))
    assert heat.get_title("left").endswith("at step 30")


def test_without_tensor_norms_there_is_no_heat_map() -> None:
    monitor = Monitor(math.inf)
    for step in range(5):
        monitor.update(1.0 + step)
    figure = _figure(monitor)
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 1  # nor a threshold


def test_an_empty_monitor_has_a_picture_too(tmp_path: Path) -> None:
    Monitor(1.0).plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


class TestLayers:
    def test_few_parameters_are_rows_of_their_own(self) -> None:
        names = ["a.weight", "a.bias", "b.weight"]
        assert layers(names) == (names, [0, 1, 2])

    def test_many_are_put_together_by_name(self) -> None:
        names = [
            f"blocks.{i}.{part}" for i in range(12) for part in ("q.w", "k.w", "v.w", "norm.w")
        ]
        labels, rows = layers(["embed.w", *names])
        assert labels == ["embed.w", *(f"blocks.{i}" for i in range(12))]
        assert rows == [0, *(1 + i for i in range(12) for _ in range(4))]

    def test_a_long_stack_is_put_together_by_neighbours(self) -> None:
        names = [f"model.layers.{i}.{part}" for i in range(80) for part in ("q", "k")]
        labels, rows = layers(names)
        assert len(labels) == 40 and sorted(set(rows)) == list(range(40))
        assert labels[0] == "model.layers.0 … model.layers.1"
        assert rows == sorted(rows)

    def test_without_names(self) -> None:
        labels, rows = layers([f"parameters[{i}]" for i in range(1000)])
        assert len(labels) == 40 and len(rows) == 1000
        assert labels[0] == "parameters[0] … parameters[24]"
