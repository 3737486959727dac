"""From measurement to JSON to page: sections, the sweep, the monitor, the pages in the tree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import everything, gpu_page, monitor, page, section, sweep
from bench.workloads import equal
from tests.bench_results import ENVIRONMENT


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_the_pages_say_what_was_measured(path: Path) -> None:
    """No table in README or docs/ was edited by hand or is of other results."""
    text = path.read_text()
    assert page.written(path, page.tables()) == text
    assert page.written(path, {name: "-\n" for name in page.tables()}) != text  # it has some


def test_a_page_without_markers_stays_as_it_is(tmp_path: Path) -> None:
    other = tmp_path / "page.md"
    other.write_text("nothing\n")
    assert page.written(other, {"sweep": "| a |\n"}) == "nothing\n"


def test_a_section_from_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()

    def measure(seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "threads": torch.get_num_threads()}

    own = section.Section(
        "own", measure, lambda r: {"mine": f"| {r['seconds']} s, {r['threads']} threads |\n"}
    )
    out, md = tmp_path / "own.json", tmp_path / "page.md"
    md.write_text("a\n<!-- mine:begin -->\nold\n<!-- mine:end -->\nz\n")
    arguments = ["--seconds", "0.5", "--threads", "1", "--json", str(out), "--markdown", str(md)]
    assert section.main(own, "doc", arguments) == 0
    assert torch.get_num_threads() == threads
    assert json.loads(out.read_text()) == {"seconds": 0.5, "threads": 1}
    table = "| 0.5 s, 1 threads |\n"
    assert md.read_text() == f"a\n<!-- mine:begin -->\n{table}<!-- mine:end -->\nz\n"
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1234 ms"), (0.0123, "12.3 ms"), (1.5e-3, "1.50 ms"), (2.5e-4, "250 µs"),
     (4.25e-6, "4.2 µs")],
)  # fmt: skip
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert section.time(seconds) == text


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "COUNTS", (2, 5))
    monkeypatch.setattr(sweep, "BYTES", (40_000,))
    result = json.loads(json.dumps(sweep.measure(0.0)))
    assert [p["tensors"] for p in result["by_tensors"]] == [2, 5]
    assert result["by_bytes"][0]["bytes"] == 40_000
    for point in result["by_tensors"]:
        assert all(0 < x < 1 for case in ("unclipped", "clipped") for x in point[case].values())
        assert point["clipped"]["floor"] > point["unclipped"]["floor"]
    tables = sweep.tables(result)
    assert set(tables) == {"sweep-by-tensors", "sweep-by-bytes"}
    assert "| 8 KB in 2 tensors |" in tables["sweep-by-tensors"]
    sweep.plot(result, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_finds_the_same_gradients_each_time() -> None:
    """Clipped to the half and doubled: nothing fades to zero while it is measured."""
    point = sweep.point(equal(3, 100), 0.0)
    assert point["clipped"]["fusedclip"] > 0
    workload = equal(3, 100)
    params = workload.parameters(torch.device("cpu"))
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    for _ in range(20):
        torch.nn.utils.clip_grad_norm_(params, norm / 2)
        torch._foreach_mul_([p.grad for p in params], 2.0)
    torch.testing.assert_close(torch.nn.utils.get_total_norm([p.grad for p in params]), norm)


def test_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "WORKLOADS", (equal(3, 16),))
    (row,) = monitor.measure(0.0)["rows"]
    assert row["tensors"] == 3 and 0 < row["plain"] < 1 and 0 < row["watched"] < 1
    row |= {"plain": 20e-6, "watched": 25e-6}
    table = monitor.tables({"environment": ENVIRONMENT, "rows": [row]})["monitor"]
    assert "| 192 B in 3 tensors | 20 µs | 25 µs | +5.0 µs, +25.0% |" in table


def _gpu_result() -> dict[str, Any]:
    timings = {
        name: {"device": seconds, "host": 1e-5, "wall": seconds}
        for name, seconds in (("fusedclip", 1e-3), ("torch", 4e-3))
    }
    row = {
        "workload": "one", "dtype": "bfloat16", "tensors": 1, "bytes": 10**9, "case": "clipped",
        "moved": 3 * 10**9, "floor": 7.5e-4, "rounds": 11, "layout": None, "timings": timings,
        "ratios": {"fusedclip": 4.0, "torch": 1.0}, "fractions": {"fusedclip": 0.75, "torch": 0.19},
    }  # fmt: skip
    return {
        "environment": {**ENVIRONMENT, "device": "A GPU", "gpu": {"driver": "580.1"}},
        "yardsticks": {"read": 3.5e12, "copy": 4e12},
        "results": [row],
    }


def test_gpu_results_are_shown_where_there_are_any(tmp_path: Path) -> None:
    assert gpu_page.table([]) == gpu_page.NOTHING
    table = gpu_page.table([_gpu_result()])
    assert "**A GPU**" in table and "| one, 1.0 GB, clipped | **4.0×** | 1.00 ms (75%) |" in table
    gpu_page.plot([_gpu_result()], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_everything_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section in a process of its own, then the pages; a failure is told, the rest goes on."""
    written: list[bool] = []
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    monkeypatch.setattr(everything.page, "write", lambda: written.append(True))
    assert everything.main(["--only", "monitor", "--scale", "0.001"]) == 0
    assert len(json.loads((tmp_path / "monitor.json").read_text())["rows"]) == 5
    monkeypatch.setattr(everything, "SECONDS", {"nonsense": 1.0})
    assert everything.main([]) != 0
    assert len(written) == 2
