"""The small workloads under pytest-benchmark: ``pytest bench --benchmark-only``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedclip

from .workloads import Workload, equal, resnet50

_WORKLOADS = [equal(300, 16), equal(1000, 1024), Workload("ResNet-50", resnet50)]
_CLIPS = {"torch": nn.utils.clip_grad_norm_, "fusedclip": fusedclip.clip_grad_norm_}


@pytest.mark.parametrize("clip", _CLIPS.values(), ids=_CLIPS)
@pytest.mark.parametrize("bites", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("workload", _WORKLOADS, ids=lambda workload: workload.name)
def test_clip(benchmark: Any, workload: Workload, bites: bool, clip: Callable[..., Any]) -> None:
    parameters = workload.parameters(torch.device("cpu"))
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = fusedclip.get_total_norm(grads).item()
    benchmark.group = f"{workload.name}, {'clipped' if bites else 'not clipped'}"

    def restore() -> tuple[tuple[Any, ...], dict[str, Any]]:
        if bites:
            torch._foreach_mul_(grads, norm / fusedclip.get_total_norm(grads).item())
        return (parameters, norm / 2 if bites else 2 * norm), {}

    result = benchmark.pedantic(clip, setup=restore, rounds=50, warmup_rounds=3)
    assert result.item() == pytest.approx(norm, rel=1e-3)
