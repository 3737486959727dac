"""Transformers' Trainer, Accelerate alone, and PEFT: ``patch()`` is enough."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.integrations import tiny
from tests.integrations.harness import ADAM_ATOL_OF_LR, Run, parameters_of, twice
from tests.integrations.record import verifies

MAX_NORM = 1.4  # between the norms of these steps: some are clipped, some are not
UNTOUCHED = (
    "accelerate.accelerator:Accelerator.clip_grad_norm_",
    "accelerate.accelerator:Accelerator._clip_grad_norm_dtensor_aware",
    "transformers.trainer:Trainer._clip_grad_norm",
    "transformers.trainer:Trainer._get_grad_norm",
    "transformers.trainer:Trainer._mixed_mesh_grad_norm",
)
# A norm that torch rounds to bfloat16 has 8 bits; the steps taken with it differ by as much.
BF16 = 2.0**-8


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, optim="sgd",
        learning_rate=0.3, max_grad_norm=MAX_NORM, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**defaults | settings)


def _train(folder: Path, model: torch.nn.Module | None = None, **settings: Any) -> Run:
    model = tiny.qwen2() if model is None else model
    return tiny.trained(
        Trainer(model, arguments(folder, **settings), train_dataset=tiny.token_rows())
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {},
            marks=verifies("Transformers Trainer", "transformers", "accelerate", what="SGD"),
            id="sgd",
        ),
        pytest.param(
            {"optim": "adamw_torch", "learning_rate": 1e-2, "gradient_accumulation_steps": 2},
            marks=verifies(
                "Transformers Trainer", "transformers", "accelerate",
                what="AdamW with accumulation over 2 batches",
            ),
            id="adamw, accumulated",
        ),
        pytest.param(
            {"bf16": True},
            marks=verifies(
                "Transformers Trainer", "transformers", "accelerate", what="`bf16=True`"
            ),
            id="autocast to bf16",
        ),
    ],
)  # fmt: skip
def test_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    tolerances: dict[str, float] = {}
    if "bf16" in settings:
        tolerances = {"later_norm_rtol": BF16, "parameter_atol": BF16}
    elif "learning_rate" in settings:
        tolerances = {"parameter_atol": ADAM_ATOL_OF_LR * settings["learning_rate"]}
    seen = twice(
        lambda: _train(tmp_path, **settings),
        max_norm=MAX_NORM, untouched=UNTOUCHED, **tolerances,
    )  # fmt: skip
    assert seen.kernels.calls == ["cpu.clip_"] * 6
    assert seen.kernels.bites < 6, "a step below the threshold is part of the test"


@verifies("Transformers Trainer", "transformers", "accelerate", what="bf16 weights")
def test_trainer_with_bf16_weights(tmp_path: Path) -> None:
    """torch's norm is one of 8 bits here, fusedclip's is exact."""
    seen = twice(
        lambda: _train(tmp_path, tiny.qwen2().bfloat16()),
        max_norm=MAX_NORM, untouched=UNTOUCHED,
        norm_rtol=4 * BF16, parameter_rtol=4 * BF16, parameter_atol=BF16,
    )  # fmt: skip
    assert all(torch.tensor(norm).bfloat16().item() == norm for norm in seen.torch.grad_norms), (
        "torch does not round this norm any more: tighten the tolerance"
    )
    assert any(torch.tensor(norm).bfloat16().item() != norm for norm in seen.fusedclip.grad_norms)


def test_no_threshold_measures_and_never_writes(tmp_path: Path) -> None:
    """``max_grad_norm=0`` makes the Trainer ask for the norm with an infinite threshold."""
    run: list[Run] = []

    def train() -> Run:
        run.append(_train(tmp_path, max_grad_norm=0.0))
        return run[-1]

    with pytest.raises(AssertionError, match="no step was above inf"):
        twice(train, max_norm=float("inf"), untouched=UNTOUCHED)
    plain, fused = run
    assert plain.grad_norms == pytest.approx(fused.grad_norms, rel=1e-5)
    for name, expected in plain.parameters.items():
        assert torch.equal(fused.parameters[name], expected)


@verifies("Accelerate", "accelerate", what="a loop of one's own, accumulation over 2 batches")
def test_accelerate_alone() -> None:
    def train() -> Run:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny.qwen2()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        rows = [{k: torch.tensor(v) for k, v in row.items()} for row in tiny.token_rows()]
        loader = torch.utils.data.DataLoader(rows, batch_size=1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        norms = []
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    norms.append(norm.item())
                optimizer.step()
                optimizer.zero_grad()
        return Run(norms, parameters_of(model))

    seen = twice(train, max_norm=MAX_NORM, untouched=UNTOUCHED)
    assert seen.kernels.calls == ["cpu.clip_"] * 4


@verifies("PEFT", "peft", "transformers", "accelerate", what="LoRA on all linear maps, AdamW")
def test_lora(tmp_path: Path) -> None:
    def train() -> Run:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(tiny.qwen2(), config)
        return _train(tmp_path, model, optim="adamw_torch", learning_rate=1e-2, max_grad_norm=0.05)

    seen = twice(train, max_norm=0.05, untouched=UNTOUCHED, parameter_atol=ADAM_ATOL_OF_LR * 1e-2)
    assert all("lora_" in name for name in seen.fusedclip.parameters)
    assert seen.kernels.calls == ["cpu.clip_"] * 6
