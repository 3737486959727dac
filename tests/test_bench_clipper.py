"""The Clipper's benchmark: its table, and that what it says is true."""

import pytest
import torch

from bench import clipper
from tests.bench_results import ENVIRONMENT
from tests.helpers import least_seconds


def test_the_table() -> None:
    rows = [{"what": "some groups", "torch": 6e-3, "fusedclip": 2e-3, "rounds": 11}]
    table = clipper.tables({"environment": ENVIRONMENT, "rows": rows})["clipper"]
    assert "| some groups | 6.00 ms → 2.00 ms | **3.0×** |" in table
    assert "2 threads" in table and "load average beforehand 0.5." in table


def test_groups_beat_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of the benchmark's row; the report has the figures."""
    torch.set_num_threads(1)
    monkeypatch.setattr(
        clipper, "side_by_side", lambda calls, *_: (least_seconds(*calls, rounds=20), 20)
    )
    row = clipper._groups(seconds=0.0)
    assert row["torch"] > 5 * row["fusedclip"]
