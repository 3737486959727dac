"""The GPU benchmark's logic, run on the CPU: who takes part, turns, restoring, the table."""

import argparse
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import contestants, gpu, gpu_clock, gpu_device, gpu_run, gpu_sweep
from bench.contestants import Contestant
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


_RODS = gpu_clock.Yardsticks(read=1e9, copy=2e9)


def _run(of: dict[str, Contestant], workload: Workload) -> list[gpu.GpuResult]:
    return gpu.measure(workload, _CPU, 0.0, _RODS, of)


def test_everybody_is_called_equally_often_and_finds_the_same_gradients() -> None:
    seen: dict[str, list[float]] = {"torch": [], "fusedclip": []}

    def watched(name: str) -> Contestant:
        clip = contestants.contestants(_CPU)[name].clip

        def call(params: list[nn.Parameter], max_norm: float) -> object:
            norm = torch.linalg.vector_norm(torch.cat([p.grad for p in params])).item()
            seen[name].append(norm / max_norm)
            return clip(params, max_norm)

        return Contestant(call)

    unclipped, clipped = _run({name: watched(name) for name in seen}, equal(10, 500))
    assert len(seen["torch"]) == len(seen["fusedclip"])
    half = len(seen["torch"]) // 2
    for ratios in seen.values():  # below the threshold first, then above it, and never drifting
        assert ratios[:half] == pytest.approx([0.5] * half, rel=1e-3)
        assert ratios[half:] == pytest.approx([2.0] * half, rel=1e-3)
    assert (unclipped.case, clipped.case) == ("not clipped", "clipped")
    assert clipped.moved == 3 * unclipped.moved == 3 * 20_000
    assert unclipped.rounds == clipped.rounds == 11


def test_all_cases_have_their_floor_and_figures() -> None:
    rows = {row.case: row for row in _run(contestants.contestants(_CPU), equal(3, 1000))}
    each = 12_000
    assert {case: row.moved // each for case, row in rows.items()} == {
        "measure": 1, "not clipped": 1, "scale": 2, "clipped": 3,
    }  # fmt: skip
    # Read at 1 GB/s; read and written at 2 GB/s.
    assert rows["measure"].floor == rows["not clipped"].floor == each / 1e9
    assert rows["scale"].floor == pytest.approx(2 * each / 2e9)
    assert rows["clipped"].floor == pytest.approx(each / 1e9 + 2 * each / 2e9)
    for row in rows.values():
        ours, theirs = row.timings["fusedclip"], row.timings["torch"]
        assert row.ratios == {"torch": 1.0, "fusedclip": theirs.wall / ours.wall}
        assert row.fractions["fusedclip"] == row.floor / ours.device


def test_the_halves_of_a_clip_do_what_they_say() -> None:
    for name, of in contestants.contestants(_CPU).items():
        params = parameters(torch.tensor([3.0]), torch.tensor([4.0]))
        assert of.measure is not None and of.scale is not None
        assert float(of.measure(params)) == (25.0 if name == "fusedclip" else 5.0)  # Σ|g|²
        of.scale(params)
        assert [p.grad.item() for p in params] == [1.5, 2.0]


def test_the_backend_is_the_one_that_serves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contestants.serving(_CPU) == "cpu"
    monkeypatch.setenv("FUSEDCLIP_BACKEND", "reference")
    assert contestants.serving(_CPU) == "reference"
    with pytest.raises(RuntimeError, match="no kernels of fusedclip's run on cpu: reference: ok"):
        contestants.contestants(_CPU)


def test_the_compiled_clip_clips() -> None:
    clip = contestants.compiled(tensors=2)["torch.compile"].clip
    params = parameters(torch.tensor([3.0, 4.0]), torch.zeros(2))
    clip(params, 1.0)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
    assert contestants.compiled(tensors=1000) == {}


def _l2norm(overflow: torch.Tensor, lists: list[list[torch.Tensor]], each: bool) -> object:
    assert not each
    return torch.linalg.vector_norm(torch.cat([g.float() for g in lists[0]])).reshape(1), None


def _scale(overflow: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def test_peers_take_part_where_they_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins of their documented signatures: none of them is installed here."""
    assert not {"apex", "Transformer Engine"} & set(contestants.contestants(_CPU))
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
    found = contestants.contestants(_CPU)
    for name in ("apex", "Transformer Engine", "deepspeed"):
        params = parameters(torch.tensor([3.0, 0.0]), torch.tensor([4.0]).bfloat16())
        assert float(found[name].clip(params, 1.0)) == pytest.approx(5.0)
        torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.0]))
        assert params[1].grad.item() == pytest.approx(0.8, rel=1e-2)


def _gpu(**other: object) -> gpu_device.Gpu:
    values: dict[str, object] = {
        "name": "G", "capability": "9.0", "multiprocessors": 132, "shared_kib": 228,
        "l2_bytes": 50 << 20, "memory_bytes": 80 << 30, "cuda": "13.0", "triton": None,
        "driver": None, "nvcc": None, "architectures": ("sm_90",),
    }  # fmt: skip
    return gpu_device.Gpu(**{**values, **other})


def _arguments(file: Path, **other: object) -> argparse.Namespace:
    values = {"device": "cpu", "only": "", "seconds": 0.0, "compiled": False, "json": file}
    return argparse.Namespace(**{**values, "yardstick_bytes": 1 << 16, **other})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MIN_ROUNDS", 1)
    monkeypatch.setattr(gpu_run, "describe", lambda device: _gpu())
    monkeypatch.setattr(gpu_run, "clocks", lambda device: {"sm_mhz": 1980.0})
    monkeypatch.setattr(gpu_run, "GPU_WORKLOADS", [equal(3, 100), equal(2, 50)])


@pytest.mark.usefixtures("small")
def test_a_late_failure_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> list[tuple[int, ...]]:
        raise RuntimeError("CUDA error: too late")

    monkeypatch.setattr(gpu_run, "GPU_WORKLOADS", [equal(3, 100), Workload("late", fails)])
    file = tmp_path / "gpu.json"
    with pytest.raises(RuntimeError, match="too late"):
        gpu_run.run(_arguments(file))
    rows = json.loads(file.read_text())["results"]
    assert [r["case"] for r in rows] == ["measure", "not clipped", "scale", "clipped"]
    assert "3 × 100, 1 KB, clipped" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_the_compiled_column_is_added_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"
    assert gpu_run.run(_arguments(file)) == 0
    before = json.loads(file.read_text())
    stand_in = {"torch": Contestant(nn.utils.clip_grad_norm_)}
    stand_in["torch.compile"] = stand_in["torch"]
    monkeypatch.setattr(gpu_run, "compiled", lambda tensors: stand_in if tensors == 3 else {})
    assert gpu_run.run(_arguments(file, compiled=True)) == 0
    after = json.loads(file.read_text())
    assert after["environment"] == before["environment"]
    assert after["yardsticks"] == before["yardsticks"]
    for old, new in zip(before["results"], after["results"], strict=True):
        added = old["tensors"] == 3 and old["case"] in ("not clipped", "clipped")
        assert ("torch.compile" in new["timings"]) == added
        assert {n: new["timings"][n] for n in old["timings"]} == old["timings"]
    file.write_text(json.dumps({**before, "environment": {**before["environment"], "torch": "1"}}))
    with pytest.raises(SystemExit, match="is of torch '1'"):
        gpu_run.run(_arguments(file, compiled=True))


@pytest.mark.usefixtures("small")
def test_a_workload_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.run(_arguments(tmp_path / "none", only="nonsense")) == 2
    assert "there are: 3 × 100, 2 × 50" in capsys.readouterr().out


def test_the_yardsticks_are_bandwidths() -> None:
    rods = gpu_clock.yardsticks(_CPU, size=1 << 20)
    assert 1e7 < rods.read < 1e13 and 1e7 < rods.copy < 1e13


def test_the_layouts_of_a_sweep() -> None:
    made = gpu_sweep.layouts(_gpu())
    assert {x.blocks for x in made} == {116, 132, 232, 264}
    assert {x.chunk_kib for x in made} == {4, 16, 64}
    assert len({x.text for x in made}) == len(made)
    # What the blocks of a multiprocessor keep fits into it.
    assert all(x.blocks_each * (x.resident_kib + 2) <= 228 for x in made)
    assert {(x.resident_kib, x.launches) for x in made if x.blocks == 116} == {
        (0, 1), (96, 1), (224, 1), (0, 2),
    }  # fmt: skip
    room = [x for x in made if x.leaves_room(_gpu())]
    assert {(x.blocks, x.resident_kib, x.launches) for x in room} == {
        (116, 0, 1), (116, 96, 1), (116, 0, 2), (232, 0, 2),
    }  # fmt: skip


def test_the_best_rows_of_a_sweep() -> None:
    def row(case: str, layout: str, over: float, room: bool = True) -> dict[str, object]:
        return {
            "workload": "w", "case": case, "layout": layout, "leaves_room": room,
            "device": 1e-3, "over_own": over,
        }  # fmt: skip

    rows = [
        row("clipped", "a", 1.1), row("clipped", "b", 1.3, room=False), row("clipped", "c", 0.9),
        {**row("not clipped", "d", 9.0), "error": "refused"}, row("not clipped", "e", 1.0),
    ]  # fmt: skip
    first, second, *others = gpu_sweep.best(rows)
    assert first.startswith("best:") and "w, clipped: b, takes all" in first
    assert second.startswith("best, room:") and "w, clipped: a " in second
    assert len(others) == 2 and all("w, not clipped: e " in line for line in others)
    assert gpu_sweep.line(rows[3]).endswith("d: refused")


def test_the_layout_is_set_for_a_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "64,3,4096,0,1"):
        if before is not None:
            monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", before)
        with gpu_sweep._layout("256,4,65536,0,1"):
            assert os.environ["FUSEDCLIP_CUDA_LAYOUT"] == "256,4,65536,0,1"
        assert os.environ.get("FUSEDCLIP_CUDA_LAYOUT") == before


def test_the_device_is_described_where_nothing_can_be_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And where nvidia-smi answers: a program of that name that knows a driver and half a clock."""
    properties = types.SimpleNamespace(
        name="G", major=9, minor=0, multi_processor_count=132, L2_cache_size=1, total_memory=2,
        shared_memory_per_multiprocessor=228 << 10, uuid="1-2",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_device.describe(_CPU)
    assert (found.multiprocessors, found.shared_kib, found.driver) == (132, 228, None)
    assert gpu_device.clocks(_CPU) == {}
    answer = tmp_path / "nvidia-smi"
    answer.write_text(
        '#!/bin/sh\ncase "$*" in *GPU-1-2*) exit 6;; *driver*) echo 580.1;; '
        '*) echo "1980, [N/A], 1980, 2619, 40, 90.5";; esac\n'
    )
    answer.chmod(0o755)
    assert gpu_device.describe(_CPU).driver == "580.1"
    assert gpu_device.clocks(_CPU) == {
        "sm_mhz": 1980, "sm_max_mhz": 1980, "memory_max_mhz": 2619, "celsius": 40, "watts": 90.5,
    }  # fmt: skip
