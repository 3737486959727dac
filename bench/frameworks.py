"""The clip inside Transformers' Trainer: ``python -m bench.frameworks``, where Transformers is.

``Trainer._clip_grad_norm``, so with everything that Trainer and Accelerate do around the clip, and
the whole step. Steps with torch's function and with fusedclip's take turns in one training run;
each number is a median. The models: a tiny Qwen2, and one that consists of the LoRA adapters of
Llama-2 7B and whose backward pass hands out given gradients.
"""

import importlib.metadata
import itertools
import math
import statistics
import sys
import tempfile
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fusedclip

from .section import Section, conditions, footer, main, time
from .workloads import Workload, lora_7b

_WARM_UP = 6  # steps
_FEWEST = 22  # steps that count


@dataclass
class _Times:
    """Seconds at each step: of the clip, and of all."""

    clip: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def medians(self, ours: bool) -> dict[str, float]:
        """Of the steps with fusedclip, which are the odd ones, or of those with torch."""
        first = _WARM_UP + ours
        return {
            "clip": statistics.median(self.clip[first::2]),
            "step": statistics.median(self.step[first::2]),
        }


class _Given(torch.autograd.Function):
    """A loss of 0 whose gradients are given ones."""

    @staticmethod
    def forward(context: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(context: Any, loss_gradient: Tensor) -> Any:
        return (None, *(gradient.clone() for gradient in context.gradients))


class Adapters(nn.Module):
    """Parameters of a workload's shapes, trained by its gradients."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        made = workload.parameters(torch.device("cpu"))
        self.gradients = [p.grad for p in made]
        for p in made:
            p.grad = None
        self.adapters = nn.ParameterList(made)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = _Given.apply(self.gradients, *self.adapters)  # type: ignore[no-untyped-call]
        return {"loss": loss}


def tiny_qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model: nn.Module = Qwen2ForCausalLM(config)
    return model


def measure(seconds: float) -> dict[str, Any]:
    where = conditions()
    lora = Workload("LoRA r=16 of 7B", lora_7b)
    return {
        "environment": where,
        "transformers": importlib.metadata.version("transformers"),
        "accelerate": importlib.metadata.version("accelerate"),
        "rows": [
            row("tiny Qwen2", tiny_qwen2(), seconds),
            row("LoRA r=16 of Llama-2 7B", Adapters(lora), seconds),
        ],
    }


def row(name: str, model: nn.Module, seconds: float) -> dict[str, Any]:
    """Without and with something to clip, for about twice so many seconds."""
    parameters = list(model.parameters())
    norm = _train(model, math.inf, _FEWEST)[1]
    cases = {}
    for case, limit in (("unclipped", 2 * norm), ("clipped", norm / 2)):
        begin = clock.perf_counter()
        _train(model, limit, _FEWEST)
        each = (clock.perf_counter() - begin) / (_WARM_UP + _FEWEST)
        times, _ = _train(model, limit, max(_FEWEST, int(seconds / each)))
        cases[case] = {"torch": times.medians(False), "fusedclip": times.medians(True)}
    return {
        "name": name,
        "tensors": len(parameters),
        "bytes": sum(p.nbytes for p in parameters),
        **cases,
    }


def _train(model: nn.Module, max_norm: float, steps: int) -> tuple[_Times, float]:
    """Train with a learning rate of 0, so that every step sees the same norm; also that norm."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times = _Times()
    turns = itertools.cycle((False, True))
    norms = []

    class Timed(Trainer):  # type: ignore[misc]
        def _clip_grad_norm(self, model: nn.Module) -> Tensor:
            begin = clock.perf_counter()
            norm: Tensor = super()._clip_grad_norm(model)
            times.clip.append(clock.perf_counter() - begin)
            norms.append(float(norm))
            return norm

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if next(turns):
                fusedclip.patch()
            self.begin = clock.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.step.append(clock.perf_counter() - self.begin)
            fusedclip.unpatch()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=_WARM_UP + steps, per_device_train_batch_size=2, optim="sgd",
            learning_rate=0.0, max_grad_norm=max_norm, logging_strategy="no", save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Timed(model, arguments, train_dataset=list(_rows()), callbacks=[Turns()])
        trainer.remove_callback(_printer())
        trainer.train()
    return times, statistics.median(norms)


def _rows() -> Iterator[dict[str, list[int]]]:
    """The same one, so that the norm is the same."""
    ids = list(range(32))
    for _ in range(2):
        yield {"input_ids": ids, "labels": ids}


def _printer() -> type:
    from transformers import PrinterCallback

    kind: type = PrinterCallback
    return kind


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = [
        "| model | | clip in the Trainer, torch → fusedclip | | whole step |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for case, words in (("unclipped", "not clipped"), ("clipped", "clipped")):
            theirs, ours = row[case]["torch"], row[case]["fusedclip"]
            lines.append(
                f"| {row['name']}, {row['tensors']} tensors, {row['bytes'] / 1e6:.1f} MB | {words} "
                f"| {time(theirs['clip'])} → {time(ours['clip'])} "
                f"| **{theirs['clip'] / ours['clip']:.1f}×** "
                f"| {time(theirs['step'])} → {time(ours['step'])} |"
            )
    versions = f"Transformers {result['transformers']}, Accelerate {result['accelerate']}."
    lines += ["", f"{versions} {footer(result['environment'])}"]
    return {"frameworks": "\n".join(lines) + "\n"}


SECTION = Section("frameworks", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
