"""TRL's trainers, all of them Transformers' Trainer underneath: ``patch()`` is enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Qwen2ForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.kto import KTOConfig, KTOTrainer

from tests.integrations import tiny
from tests.integrations.harness import twice
from tests.integrations.record import verifies
from tests.integrations.test_transformers import UNTOUCHED

COMMON: dict[str, Any] = dict(
    max_steps=4, per_device_train_batch_size=2, optim="sgd", learning_rate=0.1, logging_steps=1,
    save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0, bf16=False,
    gradient_checkpointing=False, dataloader_pin_memory=False, lr_scheduler_type="constant",
)  # fmt: skip


def preference_pairs() -> Dataset:
    """A prompt with the end it should have, and the end of another sentence."""
    ends = [sentence.split(" ", 2) for sentence in tiny.SENTENCES]
    return Dataset.from_list(
        [
            {"prompt": " ".join(words[:2]), "chosen": " " + words[2], "rejected": " " + other[2]}
            for words, other in zip(ends, [*ends[1:], ends[0]], strict=True)
        ]
    )


def _sft(folder: Path, max_norm: float) -> Trainer:
    data = Dataset.from_list([{"text": sentence} for sentence in tiny.SENTENCES])
    config = SFTConfig(str(folder), max_grad_norm=max_norm, max_length=64, **COMMON)
    return SFTTrainer(
        tiny.qwen2(), args=config, train_dataset=data, processing_class=tiny.tokenizer()
    )


def _dpo(folder: Path, max_norm: float) -> Trainer:
    config = DPOConfig(str(folder), max_grad_norm=max_norm, max_length=64, **COMMON)
    return DPOTrainer(
        tiny.qwen2(), ref_model=tiny.qwen2(), args=config, train_dataset=preference_pairs(),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip


def _kto(folder: Path, max_norm: float) -> Trainer:
    data = Dataset.from_list(
        [
            {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
            for pair in preference_pairs()
            for kind in ("chosen", "rejected")
        ]
    )
    config = KTOConfig(output_dir=str(folder), max_grad_norm=max_norm, max_length=64, **COMMON)
    return KTOTrainer(
        tiny.qwen2(), ref_model=tiny.qwen2(), args=config, train_dataset=data,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip


def _reward(folder: Path, max_norm: float) -> Trainer:
    config = RewardConfig(str(folder), max_grad_norm=max_norm, max_length=64, **COMMON)
    model_config = tiny.qwen2().config
    model_config.num_labels = 1
    return RewardTrainer(
        Qwen2ForSequenceClassification(model_config), args=config, train_dataset=preference_pairs(),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip


def _vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group: the share of vowels."""
    return [sum(c in "aeiou" for c in text) / (len(text) or 1) for text in completions]


def _online(trainer: type[Trainer], config: type, **settings: Any) -> Callable[..., Trainer]:
    """A trainer that generates the answers which it is rewarded for."""

    def make(folder: Path, max_norm: float) -> Trainer:
        changed = {"per_device_train_batch_size": 4, "num_generations": 4} | settings
        return trainer(
            tiny.qwen2(),
            reward_funcs=_vowels,
            args=config(
                str(folder), max_grad_norm=max_norm, generation_batch_size=4,
                max_completion_length=8, **COMMON | changed,
            ),
            train_dataset=preference_pairs().select_columns(["prompt"]),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip

    return make


def _case(name: str, make: Callable[[Path, float], Trainer], max_norm: float) -> Any:
    return pytest.param(
        make, max_norm, id=name,
        marks=verifies("TRL", "trl", "transformers", "accelerate", what=f"{name} with SGD"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "max_norm"),
    [
        _case("SFTTrainer", _sft, 1.0),
        _case("DPOTrainer", _dpo, 0.1),
        _case("KTOTrainer", _kto, 0.1),
        _case("RewardTrainer", _reward, 0.1),
        _case("GRPOTrainer", _online(GRPOTrainer, GRPOConfig), 0.1),
        _case("RLOOTrainer", _online(RLOOTrainer, RLOOConfig, beta=0.0), 0.1),
    ],
)
def test_trainer(tmp_path: Path, make: Callable[[Path, float], Trainer], max_norm: float) -> None:
    seen = twice(
        lambda: tiny.trained(make(tmp_path, max_norm)), max_norm=max_norm, untouched=UNTOUCHED
    )
    assert seen.kernels.calls == ["cpu.clip_"] * 4
