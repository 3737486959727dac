"""Adaptive gradient clipping by unit."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedclip.call import Clipped, announce, listeners, monitors_of
from fusedclip.checks import checked_number
from fusedclip.parameters import Parameters, check_types, parameter_list
from fusedclip.pipeline import Record
from fusedclip.sharded.placements import is_sharded

if TYPE_CHECKING:
    from fusedclip.monitor import Monitor


def agc_(parameters: Parameters, clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    r"""Adaptive gradient clipping: each unit's gradient by the norm of the unit's weights.

    .. math::
        g_i \leftarrow g_i \cdot \min\left(1,
            \frac{clip\_factor \cdot \max(\lVert w_i\rVert, eps)}{\lVert g_i\rVert}\right)

    A unit is an output of a layer: a slice along dimension 0 of a weight of two or more dimensions
    (of a linear or convolution layer), the whole of a vector or scalar (biases, gains). The paper
    leaves the last linear layer unclipped: do not pass its parameters.

    Args:
        parameters: as for ``clip_``; their gradients must be dense and real. Those without a
            gradient are skipped.
        clip_factor: the largest ratio of gradient norm to weight norm, > 0. The paper: 0.01, and
            the larger the smaller the batch.
        eps: keeps weights that start at 0 from never moving, > 0.

    Norms are fp64, so that of a finite gradient is finite; factors are fp32 (fp64 for fp64) and
    each product is rounded once. Nothing waits for the device. NaN and infinity stay in their unit:
    it becomes NaN, or 0 and NaN.

    Raises:
        ValueError: a bad argument or gradient; nothing was modified.

    Source: Brock et al. 2021, arXiv 2102.06171.

    >>> loss.backward()
    >>> fusedclip.agc_(model.body, clip_factor=0.01)
    """
    checked_number("clip_factor", clip_factor, 0.0, math.inf, "(0, inf)")
    checked_number("eps", eps, 0.0, math.inf, "(0, inf)")
    tensors = parameter_list(parameters)
    check_types(tensors)
    for index, parameter in enumerate(tensors):
        if parameter.grad is not None:
            _check_dense(index, parameter.grad)
    monitors = monitors_of(tensors)
    heard = bool(monitors or listeners.present)
    before: dict[int, Tensor] = {}  # position → Σ|g|²
    after: dict[int, Tensor] = {}
    done: set[Tensor] = set()
    with torch.no_grad():
        for index, parameter in enumerate(tensors):
            grad = parameter.grad
            if grad is None or parameter in done:  # one listed twice is clipped once
                continue
            done.add(parameter)
            # Out of place: of shards these norms may be pending sums, which clamp() adds up.
            limit = clip_factor * _unit_norms(parameter).clamp(min=eps)
            norms = _unit_norms(grad)
            factor = (limit / norms).clamp(max=1.0)
            if heard:
                before[index], after[index] = _square_sum(norms), _square_sum(norms * factor)
            grad.mul_(factor if grad.dtype == torch.float64 else factor.float())
        if heard:
            _report(tensors, before, after, monitors)


def _report(
    tensors: Sequence[Tensor],
    before: dict[int, Tensor],
    after: dict[int, Tensor],
    monitors: "list[Monitor]",
) -> None:
    """Tell monitors and listeners of the norm of all gradients and what was left of it.

    There is no threshold of all: the norm that was left stands for it, inf where nothing was cut.
    """
    device = next(iter(before.values())).device if before else torch.device("cpu")
    zero = torch.zeros((), dtype=torch.float64, device=device)
    squares = [before[i].to(device) if i in before else zero for i in range(len(tensors))]
    norm = sum(squares, zero).sqrt()
    left = sum((value.to(device) for value in after.values()), zero).sqrt()
    threshold = torch.where(left < norm, left, math.inf)
    for monitor in monitors:
        tensor_norms = torch.stack(squares).sqrt() if squares else zero.new_empty(0)
        monitor.finish(Record(tensor_norms, norm, threshold))
    announce(Clipped(tensors, norm, threshold))


def _square_sum(norms: Tensor) -> Tensor:
    """Of the units of one gradient, all shards of it."""
    total = norms.square().sum()
    return total.full_tensor() if is_sharded(total) else total  # type: ignore[attr-defined]


def _unit_norms(tensor: Tensor) -> Tensor:
    """fp64 [units, 1, …], of a vector [1]; a 0-dim factor would be rounded to the vector's type."""
    dims = tuple(range(1, tensor.dim())) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=torch.float64)
    return norms


def _check_dense(index: int, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(
            f"grads[{index}]: expected a dense gradient, got {grad.layout}; "
            "convert it with .to_dense() or leave its parameter out"
        )
    if not grad.dtype.is_floating_point:
        raise ValueError(
            f"grads[{index}]: expected a real floating-point gradient, got {grad.dtype}; "
            "leave its parameter out"
        )
