"""``python -m bench.distributed``: real processes, a table, and the model beside it."""

import json

import pytest

from bench import distributed
from tests.bench_results import ENVIRONMENT


def _result(world_size: int, all_reduce: float) -> dict[str, object]:
    times = {"torch": 6e-3, "fusedclip": 1.5e-3}
    row = {"parameters": 100, "unclipped": times, "clipped": times}
    return {
        "world_size": world_size, "load": 0.5, "all_reduce": all_reduce, "bandwidth": 1e10,
        "rows": [row],
    }  # fmt: skip


def test_tables() -> None:
    results = [_result(2, 2e-4), _result(4, 3e-4)]
    tables = distributed.tables({"environment": ENVIRONMENT, "jobs": results})
    assert (
        "| 2 processes, 100 parameters of 32 × 32 | 6.00 ms → 1.50 ms | **4.0×** |"
        in (tables["distributed"])
    )
    # 2·⌈log2 1000⌉ = 20 messages of 100 µs, and 32 MB at 10 GB/s.
    assert "| 1,000 | 32.0 MB | 2.00 ms | 3.20 ms | 0.20 ms | 0.01 ms |" in tables["model"]


def test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_WORLD_SIZES", (2,))
    (result,) = json.loads(json.dumps(distributed.measure(0.0)))["jobs"]
    assert [row["parameters"] for row in result["rows"]] == [100, 1000]
    assert 0 < result["all_reduce"] < 1
