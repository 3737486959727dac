"""``FusedClipCallback``: the patch while a Trainer trains, the monitor in logs and checkpoints."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import fusedclip
from fusedclip.integrations.transformers import FusedClipCallback, restored
from tests.integrations import tiny
from tests.integrations.harness import Run, twice
from tests.integrations.record import verifies
from tests.integrations.test_transformers import MAX_NORM, UNTOUCHED, arguments

ORIGINAL = (torch.nn.utils.clip_grad_norm_,)  # not by name: patch() would warn of this module


def _trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    return Trainer(
        tiny.qwen2(), arguments(folder, **settings), train_dataset=tiny.token_rows(),
        callbacks=list(callbacks),
    )  # fmt: skip


@verifies(
    "Transformers Trainer", "transformers", "accelerate",
    what="`FusedClipCallback`: logs, advice, checkpoints and resumption",
)  # fmt: skip
def test_it_is_the_patch(tmp_path: Path) -> None:
    switched_on: list[TrainerCallback] = []

    @contextmanager
    def patch() -> Iterator[None]:
        switched_on.append(FusedClipCallback())
        yield

    def train() -> Run:
        return tiny.trained(_trainer(tmp_path, *switched_on))

    seen = twice(train, max_norm=MAX_NORM, patch=patch, untouched=UNTOUCHED)
    summary = switched_on[0].monitor.summary()
    assert (summary.steps, summary.max_norm) == (6, MAX_NORM)
    assert summary.last_norm == pytest.approx(seen.fusedclip.grad_norms[-1], rel=1e-6)
    assert summary.top[0].name in dict(tiny.qwen2().named_parameters())


class _Reporter(TrainerCallback):
    """What W&B's or TensorBoard's callback would be given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_metrics_are_in_the_logs(tmp_path: Path) -> None:
    callback, reporter = FusedClipCallback(prefix="clip/"), _Reporter()
    trainer = _trainer(tmp_path, callback, reporter)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 6
    for log, seen in zip(steps, reporter.seen, strict=False):
        assert log["clip/norm"] == pytest.approx(log["grad_norm"])
        assert seen["clip/norm"] == log["clip/norm"]
    assert 0 < steps[-1]["clip/clipped_fraction"] < 1
    assert not any("clip/norm" in log for log in (trainer.state.log_history[-1], reporter.seen[-1]))


def test_added_first_it_is_seen_by_all(tmp_path: Path) -> None:
    reporter = _Reporter()
    trainer = _trainer(tmp_path, reporter)
    FusedClipCallback().add_to(trainer)
    trainer.train()
    assert "grad_clip/norm" in reporter.seen[0]


@pytest.mark.parametrize("restore", [False, True], ids=["as usual", "restored by the Trainer"])
def test_the_history_goes_on_after_a_resumption(tmp_path: Path, restore: bool) -> None:
    whole = FusedClipCallback()
    settings = {"save_strategy": "steps", "save_steps": 3}
    _trainer(tmp_path, whole, **settings).train()

    trainer = _trainer(
        tmp_path, FusedClipCallback(), **settings, restore_callback_states_from_checkpoint=restore
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (resumed,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, FusedClipCallback))
    ours, theirs = resumed.monitor.summary(), whole.monitor.summary()
    assert (ours.steps, ours.max_step) == (6, theirs.max_step)
    assert ours.max == pytest.approx(theirs.max, rel=1e-5)
    assert [part.name for part in ours.top] == [part.name for part in theirs.top]

    trainer.train()  # anew
    assert resumed.monitor.summary().steps == 6


def test_a_checkpoint_without_it(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    _trainer(tmp_path, **settings).train()
    callback = FusedClipCallback()
    trainer = _trainer(tmp_path, callback, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.monitor.summary().steps == 2
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["FusedClipCallback"]["attributes"]["history"]["steps"] == 2


def test_what_is_saved_is_json_with_nan_too() -> None:
    callback = FusedClipCallback(window=8)
    callback.monitor.update(math.nan, torch.tensor([1.0, math.nan]), threshold=math.inf)
    for norm in (2.0, 1.0):
        callback.monitor.update(norm, torch.tensor([0.0, norm]))
    saved = json.loads(json.dumps(callback.state(), allow_nan=False))
    other = FusedClipCallback(**saved["args"])
    other.monitor.load_state_dict(restored(saved["attributes"]["history"]))
    assert str(other.monitor.summary()) == str(callback.monitor.summary())


class _Failing(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is full")


def test_an_exception_in_a_context(tmp_path: Path) -> None:
    callback = FusedClipCallback()
    with pytest.raises(RuntimeError, match="disk"), callback:
        _trainer(tmp_path, callback, _Failing()).train()
    assert torch.nn.utils.clip_grad_norm_ is ORIGINAL[0]
    assert not fusedclip.call.observers


def test_a_training_after_an_exception(tmp_path: Path) -> None:
    callback = FusedClipCallback()
    trainer = _trainer(tmp_path, callback, _Failing())
    with pytest.raises(RuntimeError, match="disk"):
        trainer.train()
    trainer.remove_callback(_Failing)
    trainer.train()
    assert callback.monitor.summary().steps == 6
    assert torch.nn.utils.clip_grad_norm_ is ORIGINAL[0]
    assert not fusedclip.call.observers


def test_a_patch_of_the_users_stays(tmp_path: Path) -> None:
    with fusedclip.patch():
        _trainer(tmp_path, FusedClipCallback()).train()
        assert torch.nn.utils.clip_grad_norm_ is fusedclip.clip_grad_norm_


def test_a_framework_that_clips_otherwise_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a future version might, and as DeepSpeed does."""

    def own_clip(self: Accelerator, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        return torch.tensor(1.0)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", own_clip)
    callback = FusedClipCallback()
    with pytest.warns(UserWarning, match="not clipped by torch.nn.utils.clip_grad_norm_") as seen:
        _trainer(tmp_path, callback).train()
    assert sum("fusedclip either" in str(warning.message) for warning in seen) == 1
    assert callback.monitor.summary().steps == 0


def test_clips_of_other_models_are_not_counted(tmp_path: Path) -> None:
    class Other(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            other = torch.nn.Parameter(torch.zeros(2))
            other.grad = torch.ones(2)
            torch.nn.utils.clip_grad_norm_([other], 1.0)

    callback = FusedClipCallback()
    _trainer(tmp_path, callback, Other()).train()
    assert callback.monitor.summary().steps == 6


def test_summary_and_advice_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fusedclip")
    _trainer(tmp_path, FusedClipCallback()).train()
    (quiet,) = caplog.records
    assert (quiet.levelname, quiet.name) == ("INFO", "fusedclip.integrations.transformers")
    assert "6 steps, max_norm 1.4" in quiet.message
    caplog.clear()
    _trainer(tmp_path, FusedClipCallback(), max_steps=24, max_grad_norm=0.1).train()
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "24 of 24 steps were above" in warning.message
