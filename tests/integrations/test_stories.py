"""End to end: what clipping and its monitor are for."""

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from fusedclip.integrations.transformers import FusedClipCallback
from tests.integrations import tiny
from tests.integrations.record import verifies
from tests.integrations.test_trl import COMMON, preference_pairs

STEPS = 20
BAD_STEP = 4


def _dpo(folder: Path, *, max_norm: float, bad: bool, callbacks: list[Any]) -> Trainer:
    """20 steps of DPO in a fixed order; ``bad`` plants a batch of one repeated answer, 230 long.

    DPO adds up the log-probabilities of an answer's tokens, so its gradient grows with length.
    """
    pairs = preference_pairs()
    rows = [dict(pairs[i % len(pairs)]) for i in range(2 * STEPS)]
    if bad:
        junk = {"prompt": "the norm", "chosen": " " + 115 * "?!", "rejected": " a"}
        rows[2 * BAD_STEP : 2 * BAD_STEP + 2] = [junk, junk]
    changed: dict[str, Any] = {
        "max_steps": STEPS, "learning_rate": 0.5, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=DPOConfig(
            str(folder), max_grad_norm=max_norm, beta=0.3, max_length=256, **COMMON | changed
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def _losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def _finite(trainer: Trainer) -> bool:
    return all(bool(p.isfinite().all()) for p in trainer.model.parameters())


@verifies(
    "TRL", "trl", "transformers", "accelerate",
    what="DPO with a planted bad batch, which ends the run without clipping",
)  # fmt: skip
def test_dpo_survives_a_bad_batch(tmp_path: Path) -> None:
    good = _dpo(tmp_path, max_norm=0.0, bad=False, callbacks=[])
    assert _finite(good), "without the bad batch this rate needs no clipping"
    assert max(_losses(good)) < 10

    unclipped = _dpo(tmp_path, max_norm=0.0, bad=True, callbacks=[])
    assert not _finite(unclipped)
    assert max(_losses(unclipped)) > 100

    callback = FusedClipCallback()
    clipped = _dpo(tmp_path, max_norm=1.0, bad=True, callbacks=[callback])
    assert _finite(clipped)
    assert max(_losses(clipped)) < 10
    assert all(math.isfinite(loss) for loss in _losses(clipped))

    summary = callback.monitor.summary()
    assert (summary.steps, summary.worst_step) == (STEPS, BAD_STEP)
    assert summary.worst > 20 * summary.median
    # One token again and again: its row of the output layer.
    assert summary.top[0].name == "lm_head.weight"
    assert summary.top[0].share > 0.5
    assert f"at step {BAD_STEP}" in str(summary)
    assert "lm_head.weight" in str(summary)
