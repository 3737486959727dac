"""The examples run and learn: the last loss they print is below the first."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["lora", "dpo"])
def test_it_runs_and_learns(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", _EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(value) for value in re.findall(r"loss=([\d.]+)", run.stdout)]
    norms = [float(value) for value in re.findall(r"grad_norm=([\d.]+)", run.stdout)]
    assert len(losses) == len(norms) >= 5
    assert losses[-1] < 0.9 * losses[0]
    assert all(norm > 0 for norm in norms)
    if name == "dpo":
        assert "[Train Step 30]" in run.stdout.split(", clipped")[0].splitlines()[-1]
