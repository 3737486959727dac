"""FSDP1 on two gloo processes, and when its method is replaced; the cases are in distributed/."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.fsdp1 import CASES
from tests.distributed.processes import failures, run_job

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run_job("tests.distributed.fsdp1", 2)


@pytest.mark.parametrize("name", CASES[2])
def test_case(outcomes: dict[str, list[str]], name: str) -> None:
    problem = failures(outcomes.get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)


_SCRIPT = """
import sys
import torch, fusedclip
fusedclip.patch()
assert "torch.distributed.fsdp" not in sys.modules, "patch() imported it"
finders = len(sys.meta_path)
from torch.distributed.fsdp import FullyShardedDataParallel
assert FullyShardedDataParallel.clip_grad_norm_.__module__ == "fusedclip.integrations.fsdp1"
assert len(sys.meta_path) == finders - 1
fusedclip.unpatch()
assert FullyShardedDataParallel.clip_grad_norm_.__module__.startswith("torch.")
with fusedclip.patch():
    assert FullyShardedDataParallel.clip_grad_norm_.__module__ == "fusedclip.integrations.fsdp1"
assert FullyShardedDataParallel.clip_grad_norm_.__module__.startswith("torch.")
"""

_NEVER_IMPORTED = """
import sys
import torch, fusedclip
before = list(sys.meta_path)
with fusedclip.patch():
    assert len(sys.meta_path) == len(before) + 1
assert sys.meta_path == before
"""


@pytest.mark.parametrize("script", [_SCRIPT, _NEVER_IMPORTED], ids=["imported later", "never"])
def test_it_is_replaced_when_it_is_imported(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
