"""The whole API against fp64 by random sequences of calls: tests/fuzz, in a short run.

``python -m tests.fuzz --seconds 600 --seed 1`` is the long one.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedclip.backends import cpu, native, plain
from tests.fuzz.__main__ import fuzz

_ROOT = Path(__file__).parent.parent


def test_sequences_on_the_cpu() -> None:
    report = fuzz("cpu", first_seed=1, seconds=0.0, sequences=12)
    assert report.steps >= 500 and report.calls >= 50


@pytest.mark.timeout(600)
def test_sequences_on_the_emulated_gpu() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--backend", "cuda"]
    run = subprocess.run(
        [*command, "--sequences", "6", "--seed", "1"], cwd=_ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert "nothing found" in run.stdout


def _one_more_element(clip: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def planted(grads: object, *arguments: object, **options: object) -> Tensor:
        norm = clip(grads, *arguments, **options)
        if norm is None:  # left to another function
            return norm
        own = grads.tensors if hasattr(grads, "tensors") else [p.grad for p in arguments[0]]
        for grad in [grad for grad in own if grad is not None]:
            with torch.no_grad():
                behind = grad.as_strided((1,), (1,), grad.storage_offset() + grad.numel())
                behind.fill_(0.0)
        return norm

    return planted


def _slightly_more(clip: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def planted(*arguments: object, **options: object) -> Tensor | None:
        norm = clip(*arguments, **options)
        return None if norm is None else norm * (1 + 1e-5)

    return planted


_PLANTED = {
    # Or, where the next gradient lies there, by what the next call makes of it.
    "a write behind a gradient": "bytes changed that no call was to change|Failing test case",
    "a norm off by 1e-5": "not close",
    "a write without a version": "autograd cannot see",
}


@pytest.mark.parametrize("bug", _PLANTED)
def test_planted_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "a write without a version":
        monkeypatch.setattr(native, "bump_versions", lambda tensors: None)
    else:
        planted = _one_more_element if bug == "a write behind a gradient" else _slightly_more
        for module in (cpu, plain):
            monkeypatch.setattr(module, "clip_", planted(module.clip_))
    with pytest.raises(AssertionError, match=_PLANTED[bug]):
        fuzz("cpu", first_seed=1, seconds=0.0, sequences=15)
