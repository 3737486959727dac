"""apex's multi-tensor functions, on any device and for any mix of dtypes.

Code that is written against apex (``amp_C`` and ``apex.multi_tensor_apply``) finds the same
signatures here, its overflow buffer and ``per_tensor`` included:

>>> from fusedclip.integrations.apex import (
...     multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale)
>>> overflow = torch.zeros(1, dtype=torch.int, device="cuda")
>>> norm, _ = multi_tensor_applier(multi_tensor_l2norm, overflow, [grads], False)
>>> multi_tensor_applier(multi_tensor_scale, overflow, [grads, grads], 1.0 / loss_scale)

Differences from apex, all improvements: tensors of several dtypes and devices may be in one list,
the norm of finite tensors is finite, and no two tensors need the same number of dimensions.

Source: NVIDIA apex, ``csrc/amp_C_frontend.cpp`` and ``apex/multi_tensor_apply``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedclip.integrations.tensors import gathered
from fusedclip.pipeline import Unscale, run, tensor_powers
from fusedclip.rule import Rule


def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool | None = False,
) -> tuple[Tensor, Tensor]:
    """The L2 norm of all tensors as one vector, and of each.

    Args:
        chunk_size: has no effect; the kernels choose theirs.
        noop_flag: int ``[1]``; set to 1 when the norm is not finite, else left as it is.
        tensor_lists: ``[tensors]``, any shapes; a tensor listed twice counts twice.
        per_tensor: whether the norm of each is wanted.

    Returns:
        float32 ``[1]``, and float32 ``[len(tensors)]``, empty unless ``per_tensor``; on the first
        tensor's device. No host sync.
    """
    del chunk_size
    (tensors,) = _lists(tensor_lists, 1)
    with torch.no_grad():
        powers = tensor_powers(gathered(tensors), 2.0, len(tensors))
        norm = powers.sum().sqrt().to(torch.float32).reshape(1)
        _flag(noop_flag, ~norm.isfinite())
        each = powers.sqrt().to(torch.float32) if per_tensor else norm.new_empty(0)
        return norm, each


def multi_tensor_scale(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    scale: float,
) -> None:
    """``out ← in · scale`` for each pair, the product in fp32 (fp64 for fp64) and rounded once.

    Where ``out`` and ``in`` are the same tensors, it is one pass over them; else ``in`` is copied.

    Args:
        chunk_size: has no effect.
        noop_flag: int ``[1]``; set to 1 when an input is not finite (or the norm of the outputs
            exceeds float32), else left as it is. The outputs are written all the same.
        tensor_lists: ``[inputs, outputs]``, of the same shapes, of any dtypes.
        scale: the factor.

    Raises:
        ValueError: the lists differ in length, or a pair in shape; nothing was written.
    """
    del chunk_size
    inputs, outputs = _lists(tensor_lists, 2)
    with torch.no_grad():
        # The pass is in place, so it needs a type that holds the inputs and the outputs.
        types = [
            torch.promote_types(a.dtype, b.dtype) for a, b in zip(inputs, outputs, strict=True)
        ]
        narrower = [i for i, out in enumerate(outputs) if out.dtype != types[i]]
        work = list(outputs)
        for i in narrower:
            work[i] = torch.empty_like(inputs[i], dtype=types[i])
        for source, target in zip(inputs, work, strict=True):
            if target is not source:
                target.copy_(source)
        grads = gathered(work)
        if grads.empty:
            return
        # Unscaling a loss with 1 / scale, and no clip.
        unscale = Unscale(torch.full((), float(scale), dtype=torch.float32, device=grads.device))
        unscale.prepare(work, grads, None)
        run((), grads, Rule(math.inf, nonfinite="unclipped"), unscale)
        assert unscale.found_inf is not None
        _flag(noop_flag, unscale.found_inf != 0)
        for i in narrower:
            outputs[i].copy_(work[i])


class MultiTensorApply:
    """Calls a multi-tensor function with the chunk size, as apex's class of this name does."""

    available = True
    warned = False

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self,
        op: Callable[..., Any],
        noop_flag_buffer: Tensor,
        tensor_lists: Sequence[Sequence[Tensor]],
        *args: Any,
    ) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def _lists(tensor_lists: Sequence[Sequence[Tensor]], count: int) -> list[Sequence[Tensor]]:
    lists = list(tensor_lists)
    if len(lists) != count:
        raise ValueError(f"tensor_lists: expected {count} lists of tensors, got {len(lists)}")
    for other in lists[1:]:
        if len(other) != len(lists[0]):
            raise ValueError(
                f"tensor_lists: expected lists of the same length, got {len(lists[0])} and "
                f"{len(other)} tensors"
            )
        for i, (a, b) in enumerate(zip(lists[0], other, strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"tensor_lists: expected tensors of the same shape at {i}, got "
                    f"{tuple(a.shape)} and {tuple(b.shape)}"
                )
    return lists


def _flag(noop_flag: Tensor, condition: Tensor) -> None:
    noop_flag.masked_fill_(condition.reshape(()).to(noop_flag.device), 1)
