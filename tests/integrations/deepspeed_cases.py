"""What ``test_deepspeed`` runs on two ranks: every optimizer of DeepSpeed that clips.

Both ranks see their own batches. The rates are such that some steps are above the threshold and
some below. They are of SGD: to AdamW a wrong coefficient would hardly matter.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from fusedclip.integrations import deepspeed as integration
from fusedclip.integrations.deepspeed import _FP16, _UTILS, _ZERO_1_2, _ZERO_3
from tests.integrations import deepspeed_seams
from tests.integrations.deepspeed_seams import case
from tests.integrations.harness import Run, parameters_of, twice

UNTOUCHED = (
    f"{_ZERO_1_2}:DeepSpeedZeroOptimizer.get_grad_norm_direct",
    f"{_ZERO_1_2}:DeepSpeedZeroOptimizer.unscale_and_clip_grads",
    f"{_ZERO_3}:DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct",
    f"{_ZERO_3}:DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads",
    f"{_FP16}.fused_optimizer:FP16_Optimizer.unscale_and_clip_grads",
    f"{_FP16}.fused_optimizer:get_flattened_grad_norm",
    f"{_FP16}.unfused_optimizer:FP16_UnfusedOptimizer.unscale_and_clip_grads",
    f"{_FP16}.unfused_optimizer:get_weight_norm",
    "deepspeed.runtime.bf16_optimizer:get_global_norm_of_tensors",
    "deepspeed.runtime.bf16_optimizer:clip_tensors_by_global_norm",
    "deepspeed.runtime.engine:clip_grad_norm_",
    *(
        f"{_UTILS}:{name}"
        for name in (
            "get_global_norm_of_tensors",
            "clip_tensors_by_global_norm",
            "get_flattened_grad_norm",
            "get_weight_norm",
            "clip_grad_norm_",
        )
    ),
)
_STEPS = 8
_MAX_NORM = 0.8
_LOSS_SCALE = 256.0
_WIDTH = 12

# A half type's parameters keep 8 or 11 bits: where the norms' last digits differ, a parameter may
# be rounded the other way, and that is carried on by the following steps.
_PARAMETER_RTOL = {"fp32": 1e-5, "bf16": 2.0**-7, "fp16": 2.0**-10}

CASES = deepspeed_seams.CASES


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(_WIDTH, 31), nn.Tanh(), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 1)
    )


def _config(precision: str, zero: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": _MAX_NORM,
        **zero,
    }
    if precision == "bf16":
        made["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif precision == "fp16" and zero["zero_optimization"]["stage"] == 0:
        made["fp16"] = {"enabled": True, "loss_scale": _LOSS_SCALE}
    elif precision == "fp16":
        made["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    return made


def _train(precision: str, zero: dict[str, Any], overflow_at: int | None) -> Run:
    import deepspeed

    model = _model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2:].parameters()}],
        lr=0.3,
        momentum=0.5,
    )
    config = _config(precision, zero)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    unfused = type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer"
    static_scale = config.get("fp16", {}).get("loss_scale", 1.0)
    norms = []
    for step in range(_STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        before = _whole(engine)
        inputs = torch.randn(8, _WIDTH)
        target = inputs.sum(1, keepdim=True).sin()
        loss = (engine(inputs.to(dtype)).float() - target).square().mean()
        bad = step == overflow_at and dist.get_rank() == 1
        # Without ZeRO the engine's backward() does not apply the loss scale.
        engine.backward(loss * (math.inf if bad else static_scale))
        if precision == "fp32":  # the engine keeps none for it
            norms.append(_norm_of(engine.module))
        engine.step()
        norm = engine.get_global_grad_norm()
        if step == overflow_at:
            assert norm == math.inf, norm
            _assert_untouched(before, _whole(engine))
        elif norm is not None:
            norms.append(float(norm) / (static_scale if unfused else 1.0))
    parameters = _whole(engine)
    engine.destroy()
    return Run(norms, parameters)


def _norm_of(model: nn.Module) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))


def _assert_untouched(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} changed in a step that overflowed"


def _whole(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return parameters_of(engine.module)


def _run(precision: str, zero: dict[str, Any], *, overflow_at: int | None = 2) -> None:
    seen = twice(
        functools.partial(_train, precision, zero, overflow_at),
        max_norm=_MAX_NORM,
        patch=integration.patch,
        untouched=UNTOUCHED,
        parameter_rtol=_PARAMETER_RTOL[precision],
        parameter_atol=1e-2 * _PARAMETER_RTOL[precision] + 1e-6,
    )
    below = [norm for norm in seen.torch.grad_norms if norm <= _MAX_NORM]
    assert below, f"no step was below the threshold: {seen.torch.grad_norms}"
    assert not any(call.startswith("reference") for call in seen.kernels.calls)


def _zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


def _offloaded(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }


@contextmanager
def _fp16_on_the_cpu() -> Iterator[None]:
    """DeepSpeed asks oneDNN, which wants newer processors; torch itself computes in fp16 on any."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True):
        yield


@contextmanager
def _as_fused_optimizer() -> Iterator[None]:
    """DeepSpeed's FusedAdam is a CUDA extension; the wrapper around it works with any optimizer."""
    with mock.patch("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW):
        yield


@case
def without_zero_fp32() -> None:
    _run("fp32", _zero(0), overflow_at=None)


@case
def without_zero_bf16() -> None:
    """FP16_UnfusedOptimizer, for bf16 without a loss scale."""
    _run("bf16", _zero(0))


@case
def without_zero_fp16() -> None:
    with _fp16_on_the_cpu():
        _run("fp16", _zero(0))


@case
def without_zero_fp16_fused() -> None:
    with _fp16_on_the_cpu(), _as_fused_optimizer():
        _run("fp16", _zero(0))


@case
def bf16_optimizer() -> None:
    """BF16_Optimizer: ZeRO 1 with its own fp32 accumulation."""
    _run("bf16", {**_zero(1), "data_types": {"grad_accum_dtype": "fp32"}})


@case
def zero_1_bf16() -> None:
    _run("bf16", _zero(1))


@case
def zero_2_bf16() -> None:
    _run("bf16", _zero(2))


@case
def zero_2_fp16() -> None:
    with _fp16_on_the_cpu():
        _run("fp16", _zero(2))


@case
def zero_3_bf16() -> None:
    _run("bf16", _zero(3))


@case
def zero_3_fp16() -> None:
    with _fp16_on_the_cpu():
        _run("fp16", _zero(3))


@case
def zero_2_offloaded() -> None:
    _run("bf16", _offloaded(2))


@case
def zero_3_offloaded() -> None:
    _run("bf16", _offloaded(3))
