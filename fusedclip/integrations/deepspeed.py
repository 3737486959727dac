"""DeepSpeed clips with fusedclip: every ZeRO stage, and the 16-bit optimizers without ZeRO.

What costs time in DeepSpeed's clip is its pass over the gradients: a norm for each, and a product
that is written on every step. That pass is fusedclip's here. The rest stays DeepSpeed's own code,
line by line: which gradients count on which rank, the collectives, the loss scale, what an overflow
does. It is called as before, with one stand-in of one element in place of the gradients:

- whose value is the norm of the gradients of this rank, where DeepSpeed asks for their norm;
- whose value is 1, where it rescales them. What is left in it is the factor, and the gradients are
  written only when it is not 1.

With the optimizer offloaded to the CPU, DeepSpeed takes the norms one by one as the gradients
arrive; that stays as it is, and the rescaling is fusedclip's.

>>> fusedclip.integrations.deepspeed.patch()
>>> engine, *_ = deepspeed.initialize(model=model, config={"gradient_clipping": 1.0, ...})
>>> engine.step()
>>> engine.get_global_grad_norm()
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedclip.functional import clip_grads_with_norm_, get_total_norm
from fusedclip.integrations.seams import Function, Seam, Seams
from fusedclip.integrations.tensors import scale_tensors_

_REPLICATED = "ds_pipe_replicated"  # deepspeed.runtime.constants.PIPE_REPLICATED


def patch() -> Seams:
    """Let DeepSpeed's engines clip with fusedclip; also as ``with patch():``.

    Engines that exist already are changed as well. Calling it again changes nothing. When a
    function of the installed DeepSpeed is not as known, a warning names it and nothing is patched.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
    """
    import deepspeed  # noqa: F401, first: its modules cannot be imported one by one

    return _seams.patch()


def unpatch() -> None:
    """Undo every ``patch()``, exactly; harmless when nothing is patched."""
    _seams.unpatch()


class _With:
    """An object with some attributes replaced, for the length of a call; it stays untouched."""

    def __init__(self, inner: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _is_model_parallel(parameter: Any) -> bool:
    return bool(
        getattr(parameter, "model_parallel", False)
        or getattr(parameter, "tensor_model_parallel", False)
    )


def _ones(like: Tensor) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device=like.device)


def _zero_1_2_norm(original: Function) -> Function:
    def get_grad_norm_direct(
        self: Any, gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2
    ) -> Any:
        if float(norm_type) == torch.inf:
            return original(self, [get_total_norm(gradients, norm_type)], params, norm_type)
        real = [grad for grad in gradients if not getattr(grad, "_zero_padding", False)]
        counted = [
            (grad, param)
            for grad, param in zip(real, params, strict=False)
            if not getattr(param, _REPLICATED, False)
            and (self.model_parallel_rank == 0 or _is_model_parallel(param))
        ]
        if not counted:
            return original(self, [], [], norm_type)
        norm = get_total_norm([grad for grad, _ in counted], norm_type)
        return original(self, [norm], [counted[0][1]], norm_type)

    return get_grad_norm_direct


def _zero_3_norm(original: Function) -> Function:
    def get_grad_norm_direct(
        self: Any, gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2
    ) -> Any:
        everywhere = float(norm_type) == torch.inf or self._grad_norm_counts_every_rank(
            params, self._get_param_partition_group(params[0])
        )
        counted = [
            position
            for position, (_, param) in enumerate(zip(gradients, params, strict=False))
            if everywhere or self.model_parallel_rank == 0 or _is_model_parallel(param)
        ]
        if not counted:
            return original(self, gradients, params, norm_type)  # looks at no gradient
        norm = get_total_norm([gradients[position] for position in counted], norm_type)
        # DeepSpeed asks all parameters for their process group, and counts the first one here.
        first = counted[0]
        ordered = [params[first], *params[:first], *params[first + 1 :]]
        return original(self, [norm], ordered, norm_type)

    return get_grad_norm_direct


def _zero_1_2_scale(original: Function) -> Function:
    def unscale_and_clip_grads(self: Any, grad_groups_flat: Sequence[Any], total_norm: Any) -> None:
        grads = [
            grad
            for group in grad_groups_flat
            for grad in (group if isinstance(group, list) else [group])
        ]
        if grads:
            factor = _ones(grads[0])
            original(self, [factor], total_norm)
            scale_tensors_(grads, factor)

    return unscale_and_clip_grads


def _zero_3_scale(original: Function) -> Function:
    def unscale_and_clip_grads(self: Any, sub_group_id: int, total_norm: Any) -> None:
        grad = self.fp32_partitioned_groups_flat[sub_group_id].grad
        factor = _ones(grad)
        stand_in = {sub_group_id: SimpleNamespace(grad=factor)}
        original(_With(self, fp32_partitioned_groups_flat=stand_in), sub_group_id, total_norm)
        scale_tensors_([grad], factor)

    return unscale_and_clip_grads


def _tensors_norm(original: Function) -> Function:
    def get_global_norm_of_tensors(
        input_tensors: Sequence[Tensor],
        norm_type: float = 2,
        mpu: Any = None,
        moe_ep_group: Any = None,
    ) -> Any:
        if not input_tensors:
            return original(input_tensors, norm_type, mpu, moe_ep_group)
        norm = get_total_norm(input_tensors, norm_type)
        return original([norm], norm_type, mpu, moe_ep_group)

    return get_global_norm_of_tensors


def _tensors_scale(original: Function) -> Function:
    def clip_tensors_by_global_norm(
        input_tensors: Sequence[Tensor],
        max_norm: float = 1.0,
        global_norm: Any = None,
        mpu: Any = None,
        eps: float = 1e-6,
    ) -> Any:
        from deepspeed.runtime import utils

        if global_norm is None:
            global_norm = utils.get_global_norm_of_tensors(input_tensors, mpu=mpu)
        if input_tensors:
            factor = _ones(input_tensors[0])
            original([factor], max_norm, global_norm, mpu, eps)
            scale_tensors_(input_tensors, factor)
        return global_norm

    return clip_tensors_by_global_norm


def _flattened_norm(original: Function) -> Function:
    def get_flattened_grad_norm(
        parameters: Any, norm_type: float = 2, mpu: Any = None, grad_norm_mask: Any = None
    ) -> Any:
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        grads = [param.grad for param in parameters if param.grad is not None]
        if float(norm_type) != torch.inf and grad_norm_mask is not None:
            masks = grad_norm_mask[: len(grads)]
            grads = [
                piece
                for grad, mask in zip(grads, masks, strict=True)
                for piece in _outside(grad, mask)
            ]
        if not grads:
            return original([], norm_type, mpu)
        norm = get_total_norm(grads, norm_type)
        return original([SimpleNamespace(grad=norm)], norm_type, mpu)

    return get_flattened_grad_norm


def _outside(grad: Tensor, ranges: Tensor) -> list[Tensor]:
    """The pieces of a flat gradient that none of ``ranges``, [n, 2], covers."""
    if len(ranges) == 0:
        return [grad]
    edges = [0, *ranges.flatten().tolist(), grad.numel()]
    return [grad[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _weight_norm(original: Function) -> Function:
    def get_weight_norm(parameters: Any, norm_type: float = 2, mpu: Any = None) -> Any:
        from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

        if isinstance(parameters, Tensor):
            parameters = [parameters]
        counted = list(parameters)
        if float(norm_type) != torch.inf:
            rank = bwc_tensor_model_parallel_rank(mpu=mpu)
            counted = [
                param
                for param in counted
                if not getattr(param, _REPLICATED, False)
                and (rank <= 0 or _is_model_parallel(param))
            ]
        if not counted:
            return original(counted, norm_type, mpu)
        norm = get_total_norm([param.data for param in counted], norm_type)
        # Marked so that it counts on every rank.
        stand_in = SimpleNamespace(data=norm, model_parallel=True)
        return original([stand_in], norm_type, mpu)

    return get_weight_norm


def _fused_scale(original: Function) -> Function:
    def unscale_and_clip_grads(
        self: Any, grad_groups_flat: Sequence[Tensor], total_norm: Any, apply_scale: bool = True
    ) -> Any:
        if not apply_scale or not grad_groups_flat:
            return original(self, grad_groups_flat, total_norm, apply_scale)
        factor = _ones(grad_groups_flat[0])
        combined_scale = original(self, [factor], total_norm)
        scale_tensors_(grad_groups_flat, factor)
        return combined_scale

    return unscale_and_clip_grads


def _unfused_scale(original: Function) -> Function:
    def unscale_and_clip_grads(self: Any, total_norm: Any, apply_scale: bool = True) -> Any:
        grads = [p.grad for group in self.fp32_groups for p in group if p.grad is not None]
        if not apply_scale or not grads:
            return original(self, total_norm, apply_scale)
        factor = _ones(grads[0])
        stand_in = [[SimpleNamespace(grad=factor)]]
        combined_scale = original(_With(self, fp32_groups=stand_in), total_norm)
        scale_tensors_(grads, factor)
        return combined_scale

    return unscale_and_clip_grads


def _clip_fp32(original: Function) -> Function:
    def clip_grad_norm_(
        parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None
    ) -> Any:
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        parameters = [param for param in parameters if param.grad is not None]
        if not parameters:
            return original(parameters, max_norm, norm_type, mpu)
        counted = parameters
        if mpu is not None and float(norm_type) != torch.inf:
            first = mpu.get_model_parallel_rank() == 0
            counted = [param for param in parameters if first or _is_model_parallel(param)]
        norm = torch.zeros(1, device=parameters[0].device)
        if counted:
            norm = get_total_norm([param.grad for param in counted], norm_type).reshape(1)
        # DeepSpeed rescales the stand-in as well; its value is not used after that.
        stand_in = SimpleNamespace(grad=norm, device=norm.device, model_parallel=True)
        total_norm = original([stand_in], max_norm, norm_type, mpu)
        clip_grads_with_norm_(parameters, max_norm, total_norm)
        return total_norm

    return clip_grad_norm_


_UTILS = "deepspeed.runtime.utils"
_ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2"
_ZERO_3 = "deepspeed.runtime.zero.stage3"
_FP16 = "deepspeed.runtime.fp16"
_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"

_seams = Seams(
    "fusedclip.integrations.deepspeed",
    [
        Seam(_ZERO_1_2, "DeepSpeedZeroOptimizer.get_grad_norm_direct",
             ("self", "gradients", "params", "norm_type"), _zero_1_2_norm),
        Seam(_ZERO_1_2, "DeepSpeedZeroOptimizer.unscale_and_clip_grads",
             ("self", "grad_groups_flat", "total_norm"), _zero_1_2_scale),
        Seam(_ZERO_3, f"{_STAGE_3}.get_grad_norm_direct",
             ("self", "gradients", "params", "norm_type"), _zero_3_norm,
             needs=(f"{_STAGE_3}._grad_norm_counts_every_rank",
                    f"{_STAGE_3}._get_param_partition_group")),
        Seam(_ZERO_3, f"{_STAGE_3}.unscale_and_clip_grads",
             ("self", "sub_group_id", "total_norm"), _zero_3_scale),
        Seam(_UTILS, "get_global_norm_of_tensors",
             ("input_tensors", "norm_type", "mpu", "moe_ep_group"), _tensors_norm),
        Seam(_UTILS, "clip_tensors_by_global_norm",
             ("input_tensors", "max_norm", "global_norm", "mpu", "eps"), _tensors_scale),
        Seam(_UTILS, "get_flattened_grad_norm",
             ("parameters", "norm_type", "mpu", "grad_norm_mask"), _flattened_norm),
        Seam(_UTILS, "get_weight_norm", ("parameters", "norm_type", "mpu"), _weight_norm),
        Seam(_UTILS, "clip_grad_norm_",
             ("parameters", "max_norm", "norm_type", "mpu"), _clip_fp32),
        Seam(f"{_FP16}.fused_optimizer", "FP16_Optimizer.unscale_and_clip_grads",
             ("self", "grad_groups_flat", "total_norm", "apply_scale"), _fused_scale),
        Seam(f"{_FP16}.unfused_optimizer", "FP16_UnfusedOptimizer.unscale_and_clip_grads",
             ("self", "total_norm", "apply_scale"), _unfused_scale),
    ],
)  # fmt: skip
