"""The Clipper's benchmark: its table, and that what it says is true."""

import torch

from bench import clipper
from tests.bench_results import ENVIRONMENT


def test_the_table() -> None:
    rows = [{"what": "some groups", "torch": 6e-3, "fusedclip": 2e-3, "rounds": 11}]
    table = clipper.tables({"environment": ENVIRONMENT, "rows": rows})["clipper"]
    assert "| some groups | 6.00 ms → 2.00 ms | **3.0×** |" in table
    assert "2 threads" in table and "load average beforehand 0.5." in table


def test_groups_beat_a_loop() -> None:
    """Loose, so that a busy machine does not fail it; the report has the figures."""
    torch.set_num_threads(1)
    row = clipper._groups(seconds=0.5)
    assert row["torch"] > 5 * row["fusedclip"]
