"""``bench.frameworks`` measures what it says: both clips, the adapters' gradients, every step."""

import json
import math

import pytest
import torch

import fusedclip
from bench import frameworks
from bench.workloads import equal
from tests.integrations.harness import counted_kernels


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frameworks, "_WARM_UP", 2)
    monkeypatch.setattr(frameworks, "_FEWEST", 4)
    row = json.loads(json.dumps(frameworks.row("q", frameworks.tiny_qwen2(), 0.0)))
    assert row["bytes"] > 500_000
    for case in ("unclipped", "clipped"):
        for who in ("torch", "fusedclip"):
            assert 0 < row[case][who]["clip"] < row[case][who]["step"] < 1


def test_the_clips_take_turns_and_bite_as_the_threshold_says() -> None:
    model = frameworks.Adapters(equal(3, 100))
    with counted_kernels() as kernels:
        times, norm = frameworks._train(model, math.inf, 4)
    exact = torch.nn.utils.get_total_norm(model.gradients).item()
    assert norm == pytest.approx(exact, rel=1e-5)
    assert len(times.clip) == len(times.step) == frameworks._WARM_UP + 4
    assert len(kernels.calls) == len(times.clip) // 2
    assert kernels.bites == 0
    with counted_kernels() as kernels:
        frameworks._train(model, norm / 2, 4)
    assert kernels.bites == len(kernels.calls) == len(times.clip) // 2
    assert torch.nn.utils.clip_grad_norm_ is not fusedclip.clip_grad_norm_
