"""Sharded training on real process groups: gloo, 2 and 4 processes; the cases are in cases.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.distributed import cases
from tests.distributed.processes import failures, run_job, run_jobs

_ROOT = Path(__file__).parents[1]
PAIRS = [(size, name) for size, members in cases.CASES.items() for name in members]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[str]]]:
    return run_jobs("tests.distributed.cases", list(cases.CASES))


@pytest.mark.parametrize(("size", "name"), PAIRS, ids=[f"{name}-{size}" for size, name in PAIRS])
def test_case(outcomes: dict[int, dict[str, list[str]]], size: int, name: str) -> None:
    problem = failures(outcomes[size].get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)


def test_a_failure_on_one_rank_is_seen() -> None:
    """The twin: the job reports what one rank says, with its traceback."""
    outcomes = run_job("tests.distributed.broken", 2)
    assert failures(outcomes["passes"]) == ""
    assert outcomes["fails"][0] == ""
    assert "this rank is wrong" in failures(outcomes["fails"])


def test_example() -> None:
    """As the README starts it, with torchrun."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node=2", "examples/fsdp2.py", "--steps", "12",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("[Train Step")]
    assert len(lines) == 12  # rank 0 alone writes
    losses = [float(line.split("loss=")[1].split(",")[0]) for line in lines]
    assert losses[-1] < losses[0]
    sums = re.findall(r"rank (\d): the norms of all steps add up to (\S+)", run.stdout)
    assert sorted(rank for rank, _ in sums) == ["0", "1"]
    assert len({total for _, total in sums}) == 1  # the same norms on both, to the last bit


def test_jobs_end_cleanly_after_a_clip() -> None:
    """Each kind once, without busy loops: ``make soak`` has 200 jobs beside two."""
    command = ("-W", "ignore", "-m", "tests.distributed.endings")
    run = forked.python(*command, "--jobs", "6", "--busy", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 of 6 jobs did not end cleanly" in run.stdout
