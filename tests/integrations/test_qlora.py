"""QLoRA: the weights in bitsandbytes' NF4 with 4 bits, LoRA on top, AdamW with 8-bit state."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.optim import AdamW
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from trl import SFTConfig, SFTTrainer

from tests.integrations import tiny
from tests.integrations.harness import Run, twice
from tests.integrations.record import verifies
from tests.integrations.test_transformers import BF16, UNTOUCHED
from tests.integrations.test_trl import COMMON

MAX_NORM = 0.2
LR = 1e-2


def _trainer(model_folder: Path, out: Path, optim: str) -> Trainer:
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=quantized, dtype=torch.float32, device_map="cpu"
    )
    assert any(isinstance(p, bnb.nn.Params4bit) for p in model.parameters())
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    changed = {"optim": optim, "learning_rate": LR, "max_steps": 6}
    return SFTTrainer(
        model,
        args=SFTConfig(str(out), max_grad_norm=MAX_NORM, max_length=64, **COMMON | changed),
        train_dataset=Dataset.from_list([{"text": sentence} for sentence in tiny.SENTENCES]),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@verifies(
    "QLoRA", "bitsandbytes", "peft", "trl", "transformers",
    what="NF4 with double quantisation, LoRA, `optim=\"adamw_bnb_8bit\"`, SFTTrainer",
)  # fmt: skip
def test_nf4_with_adamw8bit(tmp_path: Path) -> None:
    folder = tiny.save(
        tmp_path / "model", width=128
    )  # with r=32 the 4,096 elements where 8-bit state begins
    optimizers = []

    def train() -> Run:
        trainer = _trainer(folder, tmp_path, "adamw_bnb_8bit")
        run = tiny.trained(trainer)
        optimizers.append(trainer.optimizer.optimizer)
        return run

    # TRL keeps the adapters of a 4-bit model in bfloat16, to which torch rounds its norm too.
    seen = twice(
        train, max_norm=MAX_NORM, untouched=UNTOUCHED, norm_rtol=2 * BF16, parameter_rtol=BF16,
        parameter_atol=LR,  # of the largest step: 8-bit state rounds to one of 256 values
    )  # fmt: skip
    assert seen.kernels.calls == ["cpu.clip_"] * 6
    assert all("lora_" in name for name in seen.fusedclip.parameters)
    assert all(p.dtype == torch.bfloat16 for p in seen.fusedclip.parameters.values())
    for optimizer in optimizers:
        assert isinstance(optimizer, AdamW)
        assert optimizer.args.optim_bits == 8  # which is all that AdamW8bit is
        kept = [s["state1"].dtype for s in optimizer.state.values() if "state1" in s]
        assert torch.uint8 in kept
