"""DeepSpeed on two ranks, gloo and bf16 or fp16 on the CPU; the cases are in ``deepspeed_cases``
and ``deepspeed_seams``."""

import functools
import importlib
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fusedclip.integrations import deepspeed as integration
from tests.distributed.processes import failures, run_job
from tests.integrations import deepspeed_cases
from tests.integrations.record import verifies

_TRAINED = {
    "without_zero_fp32": "no ZeRO, fp32",
    "without_zero_bf16": "no ZeRO, bf16",
    "without_zero_fp16": "no ZeRO, fp16",
    "without_zero_fp16_fused": "no ZeRO, fp16 with a fused optimizer",
    "bf16_optimizer": "ZeRO 1, bf16 accumulated in fp32",
    "zero_1_bf16": "ZeRO 1, bf16",
    "zero_2_bf16": "ZeRO 2, bf16",
    "zero_2_fp16": "ZeRO 2, fp16",
    "zero_3_bf16": "ZeRO 3, bf16",
    "zero_3_fp16": "ZeRO 3, fp16",
    "zero_2_offloaded": "ZeRO 2, bf16, optimizer offloaded",
    "zero_3_offloaded": "ZeRO 3, bf16, optimizer offloaded",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run_job("tests.integrations.deepspeed_cases", 2)


def _case(name: str) -> Any:
    what = _TRAINED.get(name)
    mark = [] if what is None else [verifies("DeepSpeed", "deepspeed", what=what)]
    return pytest.param(name, marks=mark, id=name)


@pytest.mark.parametrize("name", [_case(name) for name in deepspeed_cases.CASES[2]])
def test_case(outcomes: dict[str, list[str]], name: str) -> None:
    problem = failures(outcomes.get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)


def test_every_row_is_a_case() -> None:
    assert _TRAINED.keys() <= deepspeed_cases.CASES[2].keys()


def _functions() -> dict[str, Any]:
    """Every function that is replaced, as it is now."""
    now = {}
    for name in deepspeed_cases.UNTOUCHED:
        module, _, path = name.partition(":")
        now[name] = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    return now


def test_patch_is_undone_exactly() -> None:
    before = _functions()
    integration.patch()
    integration.patch()
    during = _functions()
    assert all(during[name] is not before[name] for name in before), "not all are replaced"
    integration.unpatch()
    assert _functions() == before
    integration.unpatch()
    assert _functions() == before


def test_as_a_context_manager() -> None:
    before = _functions()
    with integration.patch():
        during = _functions()
        with integration.patch():
            assert _functions() == during
        assert _functions() == during, "the outermost block decides"
    assert _functions() == before


def test_a_module_that_is_imported_meanwhile_is_restored_too() -> None:
    from deepspeed.runtime import bf16_optimizer, utils

    original = utils.get_global_norm_of_tensors
    with integration.patch():
        bf16_optimizer.imported_later = utils.get_global_norm_of_tensors
    try:
        assert bf16_optimizer.imported_later is original
    finally:
        del bf16_optimizer.imported_later


@pytest.mark.parametrize(
    ("target", "found", "message"),
    [
        ("runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads", None,
         "unscale_and_clip_grads (not found"),
        ("runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._grad_norm_counts_every_rank", None,
         "get_grad_norm_direct (not found: type object 'DeepSpeedZeroOptimizer_Stage3' has no "
         "attribute '_grad_norm_counts_every_rank'"),
        ("runtime.utils.get_weight_norm", lambda parameters, mpu: None,
         "get_weight_norm (takes (parameters, mpu), not (parameters, norm_type, mpu))"),
        ("runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer", None,
         "DeepSpeedZeroOptimizer.get_grad_norm_direct (not found"),
    ],
    ids=["function gone", "what it relies on gone", "other parameters", "class gone"],
)  # fmt: skip
def test_unknown_internals_are_left_alone(target: str, found: Any, message: str) -> None:
    path, _, name = f"deepspeed.{target}".rpartition(".")
    owner = _resolve(path)
    before = _functions()
    with mock.patch.object(owner, name, found):
        if found is None:
            delattr(owner, name)
        with pytest.warns(UserWarning, match="nothing was patched") as caught:
            integration.patch()
        assert message in str(caught[0].message)
        assert caught[0].filename == __file__, "the warning points at the caller"
        assert not integration._seams._replaced
        integration.unpatch()
        if found is None:
            setattr(owner, name, found)  # for mock.patch to take away
    assert _functions() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with integration.patch():
            pass


def _resolve(path: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


_SCRIPT = """
import os
import deepspeed
import torch

os.environ |= {{
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}",
}}
deepspeed.init_distributed("gloo")
model = torch.nn.Linear(4, 1).bfloat16()
config = {{
    "train_micro_batch_size_per_gpu": 8, "bf16": {{"enabled": True}}, "gradient_clipping": 0.1,
    "zero_optimization": {{"stage": 2}}, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(torch.ones(8, 4).bfloat16()).float().square().mean())
from fusedclip.backends import cpu, plain
calls = []
scale, measure = cpu.scale_, plain.clip_
cpu.scale_ = lambda *a, **k: (calls.append("scale_"), scale(*a, **k))[1]
plain.clip_ = lambda *a: (calls.append("measure"), measure(*a))[1]
engine.step()
print("calls", sorted(set(calls)), bool(engine.get_global_grad_norm() > 0.1))
"""


def test_run_patches_deepspeed(tmp_path: Path) -> None:
    """``fusedclip run`` is enough: norm and rescaling are fusedclip's kernels."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "train.py").write_text(_SCRIPT.format(port=port))
    command = [sys.executable, "-m", "fusedclip", "run", "--", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "calls ['measure', 'scale_'] True" in done.stdout, done.stdout[-2000:]
