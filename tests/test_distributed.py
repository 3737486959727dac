"""Sharded training on real process groups: gloo, 2 and 4 processes; the cases are in cases.py."""

import pytest

from tests.distributed import cases
from tests.distributed.processes import failures, run_job

PAIRS = [(size, name) for size, members in cases.CASES.items() for name in members]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[str]]]:
    return {size: run_job("tests.distributed.cases", size) for size in cases.CASES}


@pytest.mark.parametrize(("size", "name"), PAIRS, ids=[f"{name}-{size}" for size, name in PAIRS])
def test_case(outcomes: dict[int, dict[str, list[str]]], size: int, name: str) -> None:
    problem = failures(outcomes[size].get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)
