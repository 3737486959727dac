"""torch's own data parallelism; the cases are in ``torch_cases``, the plain loop in
``test_harness``."""

from typing import Any

import pytest

from tests.distributed.processes import failures, run_job
from tests.integrations import torch_cases
from tests.integrations.record import verifies

_ROWS = {
    "ddp": ("DDP", "2 ranks"),
    "fsdp2": ("FSDP2", "2 ranks, fp32"),
    "fsdp2_bf16": ("FSDP2", "2 ranks, computing in bf16"),
    "fsdp1": ("FSDP1", "2 ranks, `use_orig_params=True`"),
    "fsdp1_flat": ("FSDP1", "2 ranks, flat parameters"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run_job("tests.integrations.torch_cases", 2)


def _case(name: str) -> Any:
    system, what = _ROWS[name]
    return pytest.param(name, marks=verifies(system, what=what), id=name)


@pytest.mark.parametrize("name", [_case(name) for name in torch_cases.CASES[2]])
def test_case(outcomes: dict[str, list[str]], name: str) -> None:
    problem = failures(outcomes.get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)
