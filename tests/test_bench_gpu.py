"""The GPU benchmark's logic, run on the CPU: who takes part, turns, restoring, the table."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from bench import contestants, gpu, measure, report
from bench.workloads import GPU_WORKLOADS, Workload, equal, matrices
from tests.helpers import parameters

_CPU = torch.device("cpu")


def test_workloads_have_the_published_sizes() -> None:
    elements = {w.name: w.elements for w in GPU_WORKLOADS}
    assert elements["500 matrices"] == 225_181_696
    assert elements["1 × 1,536,066,816"] == 1_536_066_816
    assert elements["Llama-2 7B"] == 6_738_415_616
    assert elements["LoRA r=16 of 7B"] == 39_976_960


def test_a_mixed_list_takes_its_dtypes_in_turn() -> None:
    workload = Workload("mix", lambda: matrices(5, 512 * 100), (torch.float32, torch.bfloat16))
    grads = [p.grad for p in workload.parameters(_CPU)]
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16] * 2 + [torch.float32]
    assert workload.bytes == sum(g.nbytes for g in grads)
    assert workload.dtype_name == "float32 + bfloat16"


def _run(clips: dict[str, contestants.Clip], workload: Workload) -> list[gpu.GpuResult]:
    return gpu.measure(workload, _CPU, seconds=0.0, bandwidth=1e9, clips=clips)


def test_everybody_is_called_equally_often_and_finds_the_same_gradients() -> None:
    seen: dict[str, list[float]] = {"torch": [], "fusedclip": []}

    def watched(name: str) -> contestants.Clip:
        clip = contestants.contestants(_CPU, tensors=1000)[name]

        def call(params: list[nn.Parameter], max_norm: float) -> object:
            norm = torch.linalg.vector_norm(torch.cat([p.grad for p in params])).item()
            seen[name].append(norm / max_norm)
            return clip(params, max_norm)

        return call

    unclipped, clipped = _run({name: watched(name) for name in seen}, equal(10, 500))
    assert len(seen["torch"]) == len(seen["fusedclip"])
    half = len(seen["torch"]) // 2
    for ratios in seen.values():  # below the threshold first, then above it, and never drifting
        assert ratios[:half] == pytest.approx([0.5] * half, rel=1e-3)
        assert ratios[half:] == pytest.approx([2.0] * half, rel=1e-3)
    assert (unclipped.clipped, clipped.clipped) == (False, True)
    assert clipped.moved == 3 * unclipped.moved == 3 * 20_000
    assert unclipped.rounds == clipped.rounds == 11


def test_figures_of_a_result() -> None:
    timings = {
        "torch": gpu.Timing(device=6.0, host=1.0, wall=8.0),
        "fusedclip": gpu.Timing(device=2.0, host=1.0, wall=4.0),
    }
    result = gpu.GpuResult("w", "float32", 1, 10, False, 10, 10.0, 11, timings)
    assert result.ratio == 2.0
    assert result.fraction("fusedclip") == 0.5


def test_the_compiled_clip_clips() -> None:
    clip = contestants.contestants(_CPU, tensors=2)["torch.compile"]
    params = parameters(torch.tensor([3.0, 4.0]), torch.zeros(2))
    clip(params, 1.0)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
    assert "torch.compile" not in contestants.contestants(_CPU, tensors=1000)


def _l2norm(overflow: torch.Tensor, lists: list[list[torch.Tensor]], each: bool) -> object:
    assert not each
    return torch.linalg.vector_norm(torch.cat([g.float() for g in lists[0]])).reshape(1), None


def _scale(overflow: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def test_peers_take_part_where_they_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins of their documented signatures: none of them is installed here."""
    assert not {"apex", "Transformer Engine"} & set(contestants.contestants(_CPU, 1000))
    clip_grad = types.ModuleType("apex.contrib.clip_grad")
    clip_grad.clip_grad_norm_ = nn.utils.clip_grad_norm_
    kernels = types.ModuleType("transformer_engine.pytorch.optimizers")
    kernels.multi_tensor_applier = lambda kernel, overflow, lists, *rest: kernel(
        overflow, lists, *rest
    )
    kernels.multi_tensor_l2norm, kernels.multi_tensor_scale = _l2norm, _scale
    utils = types.ModuleType("deepspeed.runtime.utils")
    utils.clip_grad_norm_ = nn.utils.clip_grad_norm_
    for module in (clip_grad, kernels, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = contestants.contestants(_CPU, 1000)
    for name in ("apex", "Transformer Engine", "deepspeed"):
        params = parameters(torch.tensor([3.0, 0.0]), torch.tensor([4.0]).bfloat16())
        assert float(found[name](params, 1.0)) == pytest.approx(5.0)
        torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.0]))
        assert params[1].grad.item() == pytest.approx(0.8, rel=1e-2)


def test_the_report() -> None:
    clips = contestants.contestants(_CPU, tensors=1000)
    results = _run({name: clips[name] for name in ("torch", "fusedclip")}, equal(3, 100))
    page = report.GpuReport(measure.environment(_CPU), results)
    data = json.loads(page.to_json())
    assert [r["clipped"] for r in data["results"]] == [False, True]
    assert data["results"][0]["timings"]["fusedclip"]["device"] > 0
    table = report.gpu_table(page)
    assert [column.header for column in table.columns] == [
        "gradients", "over torch", "torch", "fusedclip",
    ]  # fmt: skip
    assert table.row_count == 2


def test_the_yardstick_is_a_bandwidth() -> None:
    assert 1e8 < gpu.copy_bandwidth(_CPU, size=1 << 20) < 1e13
