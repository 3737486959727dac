"""The table of the clip inside the Trainer; tests/integrations measures it."""

from bench import frameworks
from tests.bench_results import ENVIRONMENT


def test_table() -> None:
    def case(theirs: float, ours: float) -> dict[str, dict[str, float]]:
        return {
            "torch": {"clip": theirs, "step": 0.05},
            "fusedclip": {"clip": ours, "step": 0.05 - theirs + ours},
        }

    row = {
        "name": "a model", "tensors": 448, "bytes": 160_000_000,
        "unclipped": case(12e-3, 4e-3), "clipped": case(12e-3, 8e-3),
    }  # fmt: skip
    result = {
        "environment": ENVIRONMENT, "transformers": "5.19.0", "accelerate": "1.15.0",
        "rows": [row],
    }  # fmt: skip
    table = frameworks.tables(result)["frameworks"]
    assert (
        "| a model, 448 tensors, 160.0 MB | not clipped | 12.0 ms → 4.00 ms | **3.0×** "
        "| 50.0 ms → 42.0 ms |"
    ) in table
    assert "| clipped | 12.0 ms → 8.00 ms | **1.5×** |" in table
    assert "Transformers 5.19.0, Accelerate 1.15.0. A CPU" in table
