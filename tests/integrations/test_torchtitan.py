"""torchtitan's gradient clipping; the cases are in ``torchtitan_cases``."""

from typing import Any

import pytest

from tests.distributed.processes import failures, run_jobs
from tests.integrations import torchtitan_cases
from tests.integrations.record import verifies

_WHAT = {
    "fsdp": "FSDP2",
    "pipeline": "pipeline stages",
    "pipeline_of_fsdp": "pipeline stages of FSDP2",
    "experts": "expert parallel",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[str]]]:
    return run_jobs("tests.integrations.torchtitan_cases", list(torchtitan_cases.CASES))


def _case(size: int, name: str) -> Any:
    mark = verifies("torchtitan", "torchtitan", what=f"{_WHAT[name]}, {size} ranks")
    return pytest.param(size, name, marks=mark, id=name)


@pytest.mark.parametrize(
    ("size", "name"),
    [_case(size, name) for size, cases in torchtitan_cases.CASES.items() for name in cases],
)
def test_case(outcomes: dict[int, dict[str, list[str]]], size: int, name: str) -> None:
    problem = failures(outcomes[size].get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)
