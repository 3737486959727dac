"""The Clipper's benchmark: its rows, what they say, and that they are true."""

from pathlib import Path

import pytest
import torch

from bench import clipper


def test_a_row() -> None:
    row = clipper.Row("what", theirs=6e-3, ours=2e-3)
    assert row.markdown() == "| what | 6.00 ms → 2.00 ms | **3.0×** |"


def test_the_table_goes_between_its_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_groups", "_parameters", "_step"):
        monkeypatch.setattr(clipper, name, lambda seconds: clipper.Row("row", seconds, 1e-3))
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- clipper:begin -->\nold\n<!-- clipper:end -->\nbelow\n")
    assert clipper.main(["--seconds", "0.004", "--markdown", str(page)]) == 0
    assert page.read_text().startswith("above\n<!-- clipper:begin -->\n| |")
    assert "old" not in page.read_text() and "| row | 4.00 ms → 1.00 ms | **4.0×** |" in (
        capsys.readouterr().out
    )


def test_groups_beat_a_loop() -> None:
    """Loose, so that a busy machine does not fail it; the report has the figures."""
    torch.set_num_threads(1)
    row = clipper._groups(seconds=0.5)
    assert row.theirs > 5 * row.ours
