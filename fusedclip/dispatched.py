"""The clip as operations of torch's dispatcher, for what native code must not or cannot take.

Modes, transforms and tracers (``ambient.native_allowed``), tensor subclasses and views that are not
what their memory holds see every step here, as they see torch's own functions. Nothing reads a
value: the norm stays a tensor, so that a trace follows its input and a fake norm is a norm.

As in fusedclip's other paths a norm is taken in fp64 and handed out in fp32 or fp64, products of
half types are rounded once, and a gradient that is listed twice is scaled once.

Source: ``torch.nn.utils.clip_grad_norm_``, whose operations these are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.clip_grad import _get_total_norm as _torch_total_norm
from torch.utils._foreach_utils import _device_has_foreach_support, _has_foreach_support

from fusedclip.errors import Culprit, NonfiniteGradientError

_HALF = (torch.float16, torch.bfloat16)
_WIDEST = {
    **dict.fromkeys((*_HALF, torch.float32, torch.float64), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), torch.complex128),
}
_DOUBLE = (torch.float64, torch.complex128)


def clip_(
    grads: Sequence[Tensor],
    max_norm: float | Tensor,
    order: float,
    nonfinite: str = "propagate",
    foreach: bool | None = None,
) -> Tensor:
    """The norm of ``grads``, which are scaled by ``min(1, max_norm / (norm + 1e-6))``.

    Args:
        foreach: as of torch's functions: its operators of many tensors have no rule for some
            transforms.

    Raises:
        NonfiniteGradientError: the norm is not finite and ``nonfinite="error"``, where it is read.
        Exception: whatever torch's own functions raise for these gradients.
    """
    grads = _each_once(grads)
    norm = total_norm(grads, order, nonfinite, foreach)
    scale_(grads, max_norm, norm, foreach, zero=nonfinite == "zero")
    return norm


def total_norm(
    tensors: Sequence[Tensor],
    order: float,
    nonfinite: str = "propagate",
    foreach: bool | None = None,
) -> Tensor:
    """The norm of the tensors' norms; as of ``clip_``."""
    if not tensors:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    if not all(_is_usual(tensor) for tensor in tensors):
        return _torch_total_norm(tensors, order, nonfinite == "error", foreach)
    with torch.no_grad():
        norms: list[Tensor] = []
        for group in _groups(tensors):
            widest = _WIDEST[group[0].dtype]
            if _takes_many(group, foreach):
                norms += torch._foreach_norm(group, order, dtype=widest)
            else:
                norms += [torch.linalg.vector_norm(g, order, dtype=widest) for g in group]
        device = tensors[0].device
        norm: Tensor = torch.linalg.vector_norm(
            torch.stack([each.to(device) for each in norms]), order
        )
        double = any(tensor.dtype in _DOUBLE for tensor in tensors)
        norm = norm.to(torch.float64 if double else torch.float32)
        if nonfinite == "error" and not norm.isfinite():
            raise NonfiniteGradientError(order, _culprits(tensors))
    return norm


def scale_(
    grads: Sequence[Tensor],
    max_norm: float | Tensor,
    norm: Tensor,
    foreach: bool | None = None,
    *,
    zero: bool = False,
) -> None:
    """Multiply each gradient by ``min(1, max_norm / (norm + 1e-6))``; as of ``clip_``.

    Args:
        zero: a norm that is not finite makes every gradient 0.
    """
    if isinstance(max_norm, float) and max_norm == math.inf and not zero:
        return  # only measures
    grads = _each_once(grads)
    with torch.no_grad():
        if isinstance(max_norm, Tensor):
            max_norm = max_norm.to(norm.device)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for group in _groups(grads):
            own = factor.to(group[0].device)
            if zero:
                bad = ~norm.isfinite().to(own.device)
                for grad in group:
                    grad.copy_(torch.where(bad, 0.0, grad * own))
            elif group[0].dtype in _HALF:
                for grad in group:
                    grad.copy_(grad.to(torch.float32) * own)
            elif _takes_many(group, foreach):
                torch._foreach_mul_(group, own)
            else:
                for grad in group:
                    grad.mul_(own)


def clamp_(grads: Sequence[Tensor], limit: float, foreach: bool | None = None) -> None:
    """Each element to [-limit, limit]."""
    with torch.no_grad():
        for group in _groups(grads):
            if _takes_many(group, foreach):
                torch._foreach_clamp_min_(group, -limit)
                torch._foreach_clamp_max_(group, limit)
            else:
                for grad in group:
                    grad.clamp_(min=-limit, max=limit)


def _is_usual(tensor: Tensor) -> bool:
    """Whether the formula is meant for it; what it is not for, torch's functions judge."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in _WIDEST
        and not tensor.is_nested
    )


def _each_once(grads: Sequence[Tensor]) -> list[Tensor]:
    if is_dynamo_compiling():  # which would guard an id, and compile anew for other gradients
        return list(dict.fromkeys(grads))
    return list({id(grad): grad for grad in grads}.values())


def _groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """By device and dtype, as torch's operators of many tensors want them.

    Raises TypeError for what is no tensor, as torch's own grouping does.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected a Tensor, got {type(tensor).__name__}")
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _takes_many(group: list[Tensor], foreach: bool | None) -> bool:
    """torch's own choice between one operator of many tensors and many of one."""
    device = group[0].device
    if foreach is None:
        return bool(_has_foreach_support(group, device))
    if foreach and not _device_has_foreach_support(device):
        raise RuntimeError(
            f"foreach=True was passed, but can't use the foreach API on {device.type} tensors"
        )
    return foreach


def _culprits(tensors: Sequence[Tensor]) -> list[Culprit]:
    return [
        Culprit(index, tuple(tensor.shape))
        for index, tensor in enumerate(tensors)
        if tensor.numel() and not torch.linalg.vector_norm(tensor, math.inf).isfinite()
    ]
