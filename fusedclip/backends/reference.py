"""The reference backend: pure PyTorch, any device, any layout. It is the specification.

Every other backend is tested against these functions. They are written to be read, not to be fast,
and they also serve what the kernels cannot take: sparse and complex gradients, layouts with holes,
tensor subclasses.

``measure`` gives Σ|g|² (or max|g|) in fp64, ``coefficient`` turns a norm into a factor, ``scale_``
applies it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_HALF_TYPES = (torch.float16, torch.bfloat16)


def measure(
    grads: Sequence[Tensor],
    segments: Sequence[int] | None,
    *,
    infinity: bool,
    inv_scale: float = 1.0,
    out: Tensor,
) -> None:
    """Write per segment Σ (g·inv_scale)², or max |g·inv_scale|, to ``out``.

    Args:
        grads: any shapes and dtypes, on one device.
        segments: the index into ``out`` of each gradient; ``None`` means 0 for all.
        infinity: the maximum instead of the sum of squares. NaN propagates in both.
        inv_scale: factor on each value (1 / AMP loss scale).
        out: fp64 ``[num_segments]``, overwritten.
    """
    order = math.inf if infinity else 2.0
    out.zero_()
    for i, grad in enumerate(grads):
        values = _wide_values(grad, order) * inv_scale
        if values.numel() == 0:
            continue
        segment = 0 if segments is None else segments[i]
        if infinity:
            largest = values.abs().max()
            out[segment] = torch.maximum(out[segment], largest)  # both keep NaN
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
    return power if order == 0.0 or math.isinf(order) else power ** (1.0 / order)


def total_norm(grads: Sequence[Tensor], order: float) -> Tensor:
    """The norm of the tensors' norms, for any order: torch's definition, in fp64.

    Source: ``torch.nn.utils.get_total_norm``. For ``order=0`` it counts the tensors whose own
    "0-norm" is not zero.
    """
    norms = [tensor_norm(grad, order).to(grads[0].device) for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    return norm


def coefficient(norm: Tensor, max_norm: float | Tensor, *, zero_nonfinite: bool = False) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))`` in fp64, element by element, on ``norm``'s device.

    NaN stays NaN; an infinite ``max_norm`` gives 1, so that nothing is ever written. With
    ``zero_nonfinite`` a NaN or infinite norm gives 0.

    Source: ``torch.nn.utils.clip_grads_with_norm_``.
    """
    if norm.numel() == 1 and norm.device.type == "cpu" and not isinstance(max_norm, Tensor):
        # The same in numbers: six operations on a tensor of one element take ten times as long.
        value = norm.item()
        number = 1.0 if max_norm == math.inf else max_norm / (value + 1e-6)
        if zero_nonfinite and not math.isfinite(value):
            number = 0.0
        clamped = 1.0 if number > 1.0 else number
        return torch.full(norm.shape, clamped, dtype=torch.float64, device="cpu")
    if isinstance(max_norm, Tensor):
        limit = max_norm.to(norm.device, torch.float64, non_blocking=True)
    else:  # filled on the device: a copy from the host would wait
        limit = torch.full((), max_norm, dtype=torch.float64, device=norm.device)
    factor = (limit / (norm.to(torch.float64) + 1e-6)).clamp(max=1.0)
    factor = torch.where(limit == math.inf, torch.ones_like(factor), factor)
    if zero_nonfinite:
        factor = torch.where(norm.isfinite(), factor, torch.zeros_like(factor))
    return factor


def scale_(
    grads: Sequence[Tensor],
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
    for i, grad in enumerate(grads):
        factor = coefficient[0 if segments is None else segments[i]]
        if factor.device.type == "cpu":
            _scale_by_number_(grad, factor.item(), zero_fill)
        else:
            _scale_by_tensor_(grad, factor.to(grad.device), zero_fill)


def nonfinite_positions(grads: Sequence[Tensor]) -> list[int]:
    """The positions in ``grads`` of the gradients that hold NaN or inf. Waits for the device."""
    return [
        i
        for i, grad in enumerate(grads)
        if grad.numel() and not bool(tensor_norm(grad, math.inf).isfinite())
    ]


def _wide_values(grad: Tensor, order: float) -> Tensor:
    """The values that count, real and in fp64."""
    if grad.layout == torch.sparse_coo:
        if order not in (1.0, 2.0, math.inf):
            raise NotImplementedError(
                f"the norm of order {order} is undefined for sparse COO gradients; use 1, 2 or inf"
            )
        # Duplicate indices add up, so the values alone say nothing before coalescing.
        grad = grad.coalesce().values()
    if grad.is_complex():
        grad = grad.abs()
    if not grad.is_floating_point() or grad.dtype.itemsize == 1:
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
