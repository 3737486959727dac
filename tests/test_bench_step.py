"""``python -m bench.step``: what it times is what it says, and its tables are of planted times."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedclip
from bench import step
from bench.step import calls, load, models, training, turns, workers
from bench.workloads import gpt2_small, lora_7b, resnet50
from tests.bench_results import ENVIRONMENT

_ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """No test here is about threads, and on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sections, of little gradients and one training."""
    monkeypatch.setattr(step, "_COLD", ((2, 8),))
    monkeypatch.setattr(step, "_BUSY", ((2, 8),))
    monkeypatch.setattr(step, "_BLOCK", 2)
    monkeypatch.setattr(step, "LOOPS", {"PPO's update": models.Loop(models.ppo, 1)})


def _times(torch_median: float, ours: float) -> dict[str, Any]:
    def statistics(median: float) -> dict[str, float]:
        return {"median": median, "p95": 2 * median, "mean": 3 * median, "calls": 100}

    return {
        "torch": statistics(torch_median), "fusedclip": statistics(ours),
        "torch step": statistics(10e-3), "fusedclip step": statistics(8e-3),
    }  # fmt: skip


def _gradients(**more: Any) -> dict[str, Any]:
    return {"count": 1000, "elements": 1024, "cold": True, "clipped": False, **more}


def _table(part: str, row: dict[str, Any]) -> str:
    made = step.tables({"environment": ENVIRONMENT, part: [row]})
    assert list(made) == [f"step-{part}"]
    lines = made[f"step-{part}"].splitlines()
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1
    assert "load average beforehand 0.5." in lines[-1]
    return made[f"step-{part}"]


def test_summary() -> None:
    found = workers.summary([float(i) for i in range(1, 100)] + [1050.0])
    assert found == {"median": 50.5, "p95": pytest.approx(95.05), "mean": 60.0, "calls": 100}


def test_cold_table() -> None:
    line = "| 1,000 × 1,024, 4 MB | not clipped | 800 µs → 200 µs | **4.0×** "
    assert f"{line}| 1.60 ms → 400 µs | **4.0×** |" in _table(
        "cold", _gradients(now=_times(8e-4, 2e-4))
    )


def test_a_comparison_has_a_row_for_each_checkout_beside_its_own_torch() -> None:
    table = _table("cold", _gradients(now=_times(8e-4, 2e-4), before=_times(9e-4, 3e-4)))
    before, now = (line for line in table.splitlines() if "4 MB" in line)
    assert "4 MB, before | not clipped | 900 µs → 300 µs | **3.0×**" in before
    assert "4 MB | not clipped | 800 µs → 200 µs | **4.0×**" in now


def test_busy_table() -> None:
    quiet = {"now": _times(2e-4, 5e-5), "before": _times(2e-4, 1e-4)}
    row = _gradients(now=_times(8e-4, 1e-4), before=_times(8e-4, 4e-4), quiet=quiet)
    table = _table("busy", row)
    cells = "| 2.40 ms → 300 µs | **8.0×** | 800 µs → 100 µs | **8.0×** | 1.60 ms → 200 µs | "
    assert f"| once a step, caches cold, not clipped {cells}**8.0×** | 50 µs | 2.0 |" in table
    assert "**2.0×** | 100 µs | 4.0 |" in table  # before
    assert "| back to back, clipped |" in _table("busy", {**row, "cold": False, "clipped": True})


def test_real_table() -> None:
    row = {"loop": "one", "tensors": 12, "bytes": 40_000, "clipped": True}
    table = _table("real", {**row, "now": _times(2e-3, 4e-4)})
    line = "| one, 12 tensors, 40 KB | clipped | 2.00 ms → 400 µs | **5.0×** "
    line += "| 4.00 ms → 800 µs | **5.0×** | 10.0 ms → 8.00 ms | 20.0% → 5.0% |"
    assert line in table


def test_contestants_take_turns_in_blocks() -> None:
    turn = turns.Turn(clipped=False, seconds=0.0, least=3, most=9)
    first = ["fusedclip", "torch"]
    assert [list(names) for names in turn.rounds()] == [first, first[::-1], first]
    assert len(list(turns.Turn(False, 100.0, least=1, most=4).rounds())) == 4


@pytest.mark.parametrize("clipped", [False, True])
def test_every_call_of_a_block_clips_or_none_does(
    clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the gradients are what they were, when it is the other's turn."""
    made = calls.Calls(calls.Gradients(count=3, elements=50, cold=False))
    before = [grad.clone() for grad in made.grads]
    bites: list[bool] = []

    def watched(parameters: Any, max_norm: float) -> None:
        old = made.grads[0].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        assert (norm > max_norm) == (not torch.equal(old, made.grads[0]))
        bites.append(bool(norm > max_norm))

    monkeypatch.setitem(turns.CONTESTANTS, "torch", watched)
    times = made.turn(turns.Turn(clipped, seconds=0.0, least=1, most=1, block=25))
    assert bites == 25 * [clipped]
    assert all(torch.equal(a, b) for a, b in zip(before, made.grads, strict=True))
    assert [len(seconds) for seconds in times.values()] == [25, 25]
    assert all(0 < s < 1 for seconds in times.values() for s in seconds)


def test_cold_calls_come_after_other_data_and_idle_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    made = calls.Calls(calls.Gradients(count=2, elements=8, cold=True))
    monkeypatch.setattr(calls, "_as_after_a_backward", lambda: log.append("-"))
    for name in turns.CONTESTANTS:
        monkeypatch.setitem(turns.CONTESTANTS, name, lambda *_, name=name: log.append(name[0]))
    made.turn(turns.Turn(False, seconds=0.0, least=2, most=2))
    assert "".join(log) == "-f-t-t-f"
    assert calls._READ.nbytes == 64_000_000


def test_endless_loops_are_there_and_are_ended() -> None:
    with load.endless_loops(3) as ids:
        assert len(ids) == 3
        for pid in ids:
            os.kill(pid, 0)
    for pid in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_models_have_the_published_shapes() -> None:
    def elements(shapes: Any) -> list[int]:
        return sorted(torch.Size(shape).numel() for shape in shapes)

    with torch.device("meta"):
        gpt2, resnet = models.Gpt2(), models.resnet()
        shapes = models.llama_projections()
        layer = models.AdaptedLayer(shapes, rank=16)
    assert elements(p.shape for p in gpt2.parameters()) == elements(gpt2_small())
    assert elements(p.shape for p in resnet.parameters()) == elements(resnet50())
    adapters = [p.shape for p in layer.parameters() if p.requires_grad]
    assert elements(32 * adapters) == elements(lora_7b())
    assert len(list(models.Policy().parameters())) == 12


_SMALL = {
    "ppo": models.ppo,
    "transformer": models.transformer,
    "lora": lambda: models.lora(layers=2, scale=64, rank=2),
    "resnet": lambda: models.resnet_50(blocks=(1, 1)),
    "gpt2": lambda: models.gpt2(lambda: models.Gpt2(50, 16, 8, layers=2, heads=2)),
}


@pytest.mark.parametrize("name", _SMALL)
def test_both_arms_train_alike_and_clip_when_they_should(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.LOOPS, "small", models.Loop(_SMALL[name], 1))
    clipped: dict[str, list[bool]] = {"torch": [], "fusedclip": []}
    for who, clip in list(turns.CONTESTANTS.items()):
        monkeypatch.setitem(turns.CONTESTANTS, who, _noting(clip, clipped[who]))
    arms = training.Arms("small")
    theirs, ours = (arms.arms[who].training.parameters for who in clipped)
    start = [p.detach().clone() for p in theirs]
    for tight in (False, True):
        times = arms.turn(turns.Turn(tight, seconds=0.0, least=3, most=3))
        for who in clipped:
            assert clipped[who][-3:] == 3 * [tight]
            both = list(zip(times[who], times[f"{who} step"], strict=True))
            assert len(both) == 3 and all(0 < clip < whole for clip, whole in both)
    assert any(not torch.equal(a, b) for a, b in zip(start, theirs, strict=True))
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    assert arms.size()["tensors"] == len(theirs)


def _noting(clip: turns.Clip, clipped: list[bool]) -> turns.Clip:
    def noted(parameters: Any, max_norm: float) -> Any:
        norm = clip(parameters, max_norm)
        clipped.append(bool(norm > max_norm))
        return norm

    return noted


def test_all_parts_and_a_comparison(tiny: None, tmp_path: Path) -> None:
    """Structure, not speed: in processes of their own, beside another checkout."""
    out = tmp_path / "step.json"
    arguments = ["--seconds", "0", "--threads", "1", "--against", str(_ROOT), "--json", str(out)]
    assert step.run(arguments) == 0
    result = json.loads(out.read_text())
    assert len(result["cold"]) == 2 and len(result["busy"]) == 3 and len(result["real"]) == 2
    assert set(step.tables(result)) == {"step-cold", "step-busy", "step-real"}
    for part, count in (("cold", 20), ("busy", 12), ("real", 8)):
        for row in result[part]:
            for times in (row["now"], row["before"], *row.get("quiet", {}).values()):
                for statistics in times.values():
                    assert 0 < statistics["median"] <= statistics["p95"] < 10
                    assert statistics["calls"] == count
    assert {"tensors": 12, "bytes": 39_188}.items() <= result["real"][0].items()


def test_only_the_chosen_parts(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.run(["--seconds", "0", "--only", "cold"]) == 0
    shown = capsys.readouterr().out
    assert "once a step" in shown and ", before" not in shown
    assert "inside a training" not in shown and "endless loop" not in shown


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkout with the version 9.9."""
    for folder in ("fusedclip", "triton_kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / folder, tmp_path / folder, ignore=ignored)
    version = tmp_path / "fusedclip" / "_version.py"
    version.write_text(version.read_text().replace(fusedclip.__version__, "9.9"))
    return tmp_path


def test_the_other_checkout_is_measured_by_this_benchmark(other: Path) -> None:
    with workers.processes(_ROOT, other) as started:
        versions = {name: worker.about["version"] for name, worker in started.items()}
    assert versions == {"now": fusedclip.__version__, "before": "9.9"}


def test_nothing_is_lent_to_the_other_checkout(
    other: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A module that only this checkout has is missing there, installed editable or not."""
    (other / "fusedclip" / "pipeline.py").unlink()
    with pytest.raises(RuntimeError, match="ended with status 1"):
        workers.Worker(other)
    assert f"{other} has no fusedclip.pipeline" in capfd.readouterr().err


def test_a_checkout_that_was_not_built_is_refused(other: Path) -> None:
    for library in (other / "fusedclip").glob("_C*"):
        library.unlink()
    with (
        pytest.raises(ValueError, match="only 'now' has its native module built"),
        workers.processes(_ROOT, other),
    ):
        pass
