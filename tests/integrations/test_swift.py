"""ms-swift from its command line, which starts a Python of its own: ``fusedclip run`` is enough.

Its trainer wraps ``Accelerator.clip_grad_norm_`` while it trains and asks the norm
``.isnan().item()`` at every step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integrations import tiny
from tests.integrations.harness import Comparison, Kernels, Run, compare
from tests.integrations.record import ROOT, verifies

STEPS = 4
# Another sitecustomize, which fusedclip's hands on to: the kernels' calls of the training process
# end up in a file.
_COUNTING = """
import atexit, json, os, sys
if sys.argv[0].endswith(("sft.py", "rlhf.py")):
    from tests.integrations.harness import counted_kernels
    counting = counted_kernels()
    kernels = counting.__enter__()
    def write(target=os.environ["COUNTS"]):
        with open(target, "w") as file:
            json.dump({"calls": kernels.calls, "bites": kernels.bites}, file)
    atexit.register(write)
"""


def _rows(kind: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for sentence in tiny.SENTENCES:
        messages = [
            {"role": "user", "content": sentence[:12]},
            {"role": "assistant", "content": sentence[12:]},
        ]
        rows.append({"messages": messages})
        if kind == "dpo":
            rows[-1]["rejected_response"] = sentence[::-1]
    return rows


def _swift(folder: Path, kind: str, max_norm: float, before: list[str]) -> tuple[Run, Kernels]:
    """Train by LoRA in a process of its own; ``before`` are the words before ``swift``."""
    model = tiny.save(folder / "model")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(kind)))
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(_COUNTING)
    out = folder / ("fusedclip" if before else "torch")
    counts = out.with_suffix(".json")
    scripts = Path(sys.executable).parent
    command = ["swift", "rlhf", "--rlhf_type", "dpo"] if kind == "dpo" else ["swift", "sft"]
    options = {
        "model": model, "model_type": "qwen2", "template": "qwen2_5", "dataset": data,
        "tuner_type": "lora", "torch_dtype": "float32", "max_length": 128, "output_dir": out,
        "add_version": "false", "check_model": "false", "use_hf": "true", "report_to": "none",
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": max_norm, "logging_steps": 1,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [*before, *command, *words],
        env={
            **os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}", "COUNTS": str(counts),
            "OMP_NUM_THREADS": "1", "MODELSCOPE_CACHE": str(folder / "cache"),
        },
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checkpoint = out / f"checkpoint-{STEPS}"
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    norms = [line["grad_norm"] for line in log if "grad_norm" in line]
    run = Run(norms, load_file(checkpoint / "adapter_model.safetensors"))
    return run, Kernels(**json.loads(counts.read_text()))


@pytest.mark.parametrize(
    ("kind", "max_norm"),
    [
        pytest.param(
            kind, max_norm, id=kind,
            marks=verifies(
                "ms-swift", "ms-swift", "transformers", "trl", "peft",
                what=f"`python -m fusedclip run -- swift {command}` with LoRA, SGD",
            ),
        )
        for kind, max_norm, command in [("sft", 0.6, "sft"), ("dpo", 0.1, "rlhf --rlhf_type dpo")]
    ],
)  # fmt: skip
def test_command_line(tmp_path: Path, kind: str, max_norm: float) -> None:
    plain, none = _swift(tmp_path, kind, max_norm, [])
    assert none.calls == []
    fused, kernels = _swift(
        tmp_path, kind, max_norm, [sys.executable, "-m", "fusedclip", "run", "--"]
    )
    assert kernels.calls == ["cpu.clip_"] * STEPS
    compare(Comparison(plain, fused, kernels), max_norm=max_norm)
