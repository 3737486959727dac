"""The reference backend: pure PyTorch, any device, any layout. It is the specification.

Every other backend is tested against these functions. They are written to be read, not to be fast,
and they also serve what the kernels cannot take: sparse and complex gradients, layouts with holes,
tensor subclasses.

``measure`` gives Σ|g|² (or max|g|) in fp64, ``coefficient`` turns a norm into a factor, ``scale_``
applies it.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from fusedclip.rule import Segments

# What a NaN or infinite norm does to the gradients; its place is its number in the kernels.
NONFINITE = (
    "propagate",  # multiply by the coefficient as computed: 0 or NaN
    "zero",  # set every gradient of the segment to 0
    "error",  # touch nothing; the caller raises
    "unclipped",  # multiply by 1 (and by 1 / loss scale)
)

# The segment of a gradient that counts towards no norm and is scaled by none.
NOT_COUNTED = -1

# The types that the kernels take, in the order of enum class DType in csrc/clip.h.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# In the type itself a product would be rounded more than once.
_HALF_TYPES = tuple(dtype for dtype in DTYPES if torch.finfo(dtype).bits < 32)
COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)


@dataclass(eq=False, repr=False)
class ReferenceGradients:
    """The gradients of one call on one device that no kernel takes."""

    backend: ClassVar[ModuleType] = sys.modules[__name__]
    tensors: list[Tensor]
    indices: list[int]  # their positions in the call's input
    device: torch.device

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def has_float64(self) -> bool:
        return any(grad.dtype in (torch.float64, torch.complex128) for grad in self.tensors)

    @property
    def has_float16(self) -> bool:
        return any(grad.dtype == torch.float16 for grad in self.tensors)

    @property
    def has_empty(self) -> bool:
        return any(grad.numel() == 0 for grad in self.tensors)


def clip_(grads: ReferenceGradients, max_norms: object, **options: object) -> None:
    """No fused form: ``None``, as of ``cuda.clip_``, says to take one step after the other."""


def measure(
    grads: ReferenceGradients, segments: Sequence[int] | None, *, infinity: bool, out: Tensor
) -> None:
    """Write per segment Σ|g|², or max|g|, to ``out``.

    Args:
        segments: the index into ``out`` of each gradient, or ``NOT_COUNTED``; ``None``: 0 for all.
        infinity: the maximum instead of the sum of squares. NaN propagates in both.
        out: fp64 ``[num_segments]`` on the gradients' device, overwritten.
    """
    order = math.inf if infinity else 2.0
    out.zero_()
    for i, grad in enumerate(grads.tensors):
        segment = 0 if segments is None else segments[i]
        if segment == NOT_COUNTED or grad.numel() == 0:
            continue
        values = _wide_values(grad, order)
        if infinity:
            if values.numel():
                out[segment] = torch.maximum(out[segment], values.abs().max())  # both keep NaN
        else:
            # sum() adds pairwise; vector_norm adds one by one and loses digits on long tensors.
            out[segment] += values.square().sum()


def tensor_norm(grad: Tensor, order: float) -> Tensor:
    """The p-norm of one tensor as an fp64 scalar, with the exactness of fp64 arithmetic.

    Source: ``torch.linalg.vector_norm``; its error for the norm of an empty tensor that has no
    identity is passed on.
    """
    norm: Tensor = torch.linalg.vector_norm(_wide_values(grad, order), order)
    return norm


def power_sum(grad: Tensor, order: float) -> Tensor:
    """What adds up over the parts of a tensor, as an fp64 scalar: Σ|g|^p.

    For ``order=0`` it is the number of elements that are not zero; for ±inf, where parts combine by
    maximum or minimum, that.
    """
    if order == 2.0:
        return _wide_values(grad, order).square().sum()
    norm = tensor_norm(grad, order)
    return norm if order == 0.0 or math.isinf(order) else norm**order


def norm_of_power_sum(power: Tensor, order: float) -> Tensor:
    """The p-norm of a tensor, element by element, from its ``power_sum``."""
    if order == 2.0:
        return power.sqrt()  # as torch's power does, which looks for a while at its arguments
    return power if order == 0.0 or math.isinf(order) else power ** (1.0 / order)


def operation_of(order: float) -> str:
    """How power sums of parts combine: ``"sum"``, ``"max"`` or ``"min"``."""
    return {math.inf: "max", -math.inf: "min"}.get(order, "sum")


def nothing(like: Tensor, count: int, order: float) -> Tensor:
    """The power sums of no element, ``[count]``."""
    return like.new_full((count,), math.inf if order == -math.inf else 0.0)


def combined(powers: Tensor, segments: Segments, order: float, *, of_norms: bool = False) -> Tensor:
    """The power sum of each segment, fp64 ``[segments.count]``, from those of its members.

    Args:
        powers: fp64 ``[members]``.
        of_norms: they are of whole tensors, of which order 0 counts those that are not zero.
    """
    if of_norms and order == 0.0:
        powers = (powers != 0.0).to(torch.float64)
    operation = operation_of(order)
    if segments.of is not None:
        index = torch.tensor(segments.of, dtype=torch.int64, device="cpu")
        index = index.to(powers.device, non_blocking=True)
        result = nothing(powers, segments.count, order)
        if operation == "sum":
            return result.index_add_(0, index, powers)
        return result.scatter_reduce_(0, index, powers, f"a{operation}")
    if len(powers) <= 1:
        return powers if len(powers) else nothing(powers, 1, order)
    if operation == "sum":
        return powers.sum(0, keepdim=True)
    return (powers.amax if operation == "max" else powers.amin)(0, keepdim=True)


def total_norm(grads: Sequence[Tensor], order: float) -> Tensor:
    """The norm of the tensors' norms, for any order: torch's definition, in fp64.

    Source: ``torch.nn.utils.get_total_norm``. For ``order=0`` it counts the tensors whose own
    "0-norm" is not zero.
    """
    norms = [tensor_norm(grad, order).to(grads[0].device) for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    return norm


def coefficient(norm: Tensor, max_norm: float | Tensor, nonfinite: str = "propagate") -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))`` in fp64, element by element, on ``norm``'s device.

    NaN stays NaN; an infinite ``max_norm`` gives 1, so that nothing is ever written. Of a NaN or
    infinite norm ``nonfinite="zero"`` makes 0 and ``"unclipped"`` 1.

    Source: ``torch.nn.utils.clip_grads_with_norm_``.
    """
    if norm.numel() == 1 and norm.device.type == "cpu" and not isinstance(max_norm, Tensor):
        # The same in numbers: six operations on a tensor of one element take ten times as long.
        value = norm.item()
        number = 1.0 if max_norm == math.inf else max_norm / (value + 1e-6)
        if not math.isfinite(value):
            number = _OF_NONFINITE.get(nonfinite, number)
        clamped = 1.0 if number > 1.0 else number
        return torch.full(norm.shape, clamped, dtype=torch.float64, device="cpu")
    if isinstance(max_norm, Tensor):
        limit = max_norm.to(norm.device, torch.float64, non_blocking=True)
    else:  # filled on the device: a copy from the host would wait
        limit = torch.full((), max_norm, dtype=torch.float64, device=norm.device)
    factor = (limit / (norm.to(torch.float64) + 1e-6)).clamp(max=1.0)
    factor = torch.where(limit == math.inf, torch.ones_like(factor), factor)
    return of_nonfinite(factor, norm, nonfinite)


_OF_NONFINITE = {"zero": 0.0, "unclipped": 1.0}


def of_nonfinite(factor: Tensor, norm: Tensor, nonfinite: str) -> Tensor:
    """Coefficients with what ``nonfinite`` makes of those whose norm is NaN or infinite."""
    special = _OF_NONFINITE.get(nonfinite)
    if special is None:
        return factor
    good = norm.isfinite() & factor.isfinite()
    return torch.where(good, factor, torch.full_like(factor, special))


def scale_(
    grads: ReferenceGradients,
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """Multiply each gradient in place by the coefficient of its segment.

    The product is taken in fp32 (fp64 for fp64 gradients) and rounded once. On a CPU a gradient
    whose coefficient is 1 is not touched; elsewhere it is multiplied by 1, which changes no bit and
    needs no host sync. With ``zero_fill`` a coefficient of 0 writes zeros over NaN and inf.

    Args:
        coefficient: fp64 ``[num_segments]``.
    """
    for i, grad in enumerate(grads.tensors):
        segment = 0 if segments is None else segments[i]
        if segment == NOT_COUNTED:
            continue
        factor = coefficient[segment]
        if factor.device.type == "cpu":
            _scale_by_number_(grad, factor.item(), zero_fill)
        else:
            _scale_by_tensor_(grad, factor.to(grad.device), zero_fill)


def nonfinite_indices(grads: ReferenceGradients) -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf. Waits."""
    return [
        index
        for index, grad in zip(grads.indices, grads.tensors, strict=True)
        if grad.numel() and not bool(tensor_norm(grad, math.inf).isfinite())
    ]


def problem() -> str:
    """Why this backend cannot run here: it always can."""
    return ""


def device_type() -> str:
    """A type of device that it serves: it serves all."""
    return "cpu"


def _wide_values(grad: Tensor, order: float) -> Tensor:
    """The values that count, real and in fp64."""
    if grad.layout == torch.sparse_coo:
        # Duplicate indices add up, so the values alone say nothing before coalescing.
        grad = grad.coalesce().values()
    if grad.is_complex():
        grad = grad.abs()
    if grad.dtype not in DTYPES:
        raise RuntimeError(f"expected a floating point or complex gradient, got {grad.dtype}")
    return grad.to(torch.float64)


def _scale_by_number_(grad: Tensor, factor: float, zero_fill: bool) -> None:
    target = grad._values() if grad.layout == torch.sparse_coo else grad
    if target.dtype not in (torch.float64, torch.complex128):
        factor = torch.tensor(factor, dtype=torch.float32, device="cpu").item()
    if factor == 1.0:
        return
    if zero_fill and factor == 0.0:
        target.zero_()
    elif target.dtype in _HALF_TYPES:
        target.copy_(target.to(torch.float32) * factor)
    else:
        target.mul_(factor)


def _scale_by_tensor_(grad: Tensor, factor: Tensor, zero_fill: bool) -> None:
    target = grad._values() if grad.layout == torch.sparse_coo else grad
    wide = torch.float64 if target.dtype in (torch.float64, torch.complex128) else torch.float32
    factor = factor.to(wide)
    scaled = (target.to(wide) if target.dtype in _HALF_TYPES else target) * factor
    if zero_fill:
        scaled = torch.where(factor == 0, torch.zeros_like(scaled), scaled)
    target.copy_(scaled)
