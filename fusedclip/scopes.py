"""Norms and thresholds by segment: a parameter group each, or a parameter each.

On one CPU or CUDA device it is one launch, however many segments there are; elsewhere all segments
are measured together and then scaled together.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, reference
from fusedclip.gradients import Gradients, Parameters
from fusedclip.pipeline import coefficient, raise_if_nonfinite, tensor_powers


def clip_segments_(
    parameters: Parameters,
    grads: Gradients,
    segments: Sequence[int],
    max_norms: Sequence[float],
    order: float,
    nonfinite: str,
    process_group: Any,
) -> Tensor:
    """Clip each segment by its own norm, in place.

    Args:
        parameters: what the user gave, which may know names.
        segments: the index into ``max_norms`` of each entry of ``parameters``.
        max_norms: the threshold of each segment.

    Returns:
        The norms before clipping, ``[num_segments]``; 0 for a segment without gradient.
    """
    if grads.empty and process_group is None:
        return torch.zeros(len(max_norms))
    with torch.no_grad():
        limits = torch.tensor(max_norms, dtype=torch.float64, device="cpu")
        norms = None
        if process_group is None and order in (2.0, math.inf):
            norms = _fused(grads, segments, limits, order, nonfinite)
        if norms is None:
            return _split(parameters, grads, segments, limits, order, nonfinite, process_group)
        if nonfinite == "error":
            raise_if_nonfinite(_all_finite(norms), grads, order, parameters)
        return norms


def _fused(
    grads: Gradients, segments: Sequence[int], limits: Tensor, order: float, nonfinite: str
) -> Tensor | None:
    """Everything in one native call, where one backend has all gradients; else ``None``."""
    infinity = order == math.inf
    if grads.only_cpu:
        own = [segments[index] for index in grads.cpu.indices]
        return cpu.clip_segments_(grads.cpu, own, limits, infinity=infinity, nonfinite=nonfinite)
    if grads.only_one_gpu and grads.cuda:
        (on_gpu,) = grads.cuda
        own = [segments[index] for index in on_gpu.indices]
        limits = limits.to(cuda.device(on_gpu), non_blocking=True)
        return cuda.clip_segments_(on_gpu, own, limits, infinity=infinity, nonfinite=nonfinite)
    return None


def _split(
    parameters: Parameters,
    grads: Gradients,
    segments: Sequence[int],
    limits: Tensor,
    order: float,
    nonfinite: str,
    process_group: Any,
) -> Tensor:
    powers = tensor_powers(grads, order, len(segments))
    index = torch.tensor(segments, device="cpu").to(powers.device, non_blocking=True)
    sums = powers.new_zeros(len(limits))
    if order == math.inf:
        sums.scatter_reduce_(0, index, powers, "amax")
    else:
        sums.index_add_(0, index, powers)
    if process_group is not None:
        from fusedclip import distributed

        sums = distributed.all_reduce(sums, distributed.operation_of(order), process_group)
    norms = reference.norm_of_power_sum(sums, order).to(grads.norm_dtype)
    if nonfinite == "error":
        raise_if_nonfinite(_all_finite(norms), grads, order, parameters)
    factors = coefficient(norms, limits, nonfinite)
    for part in grads.parts:
        own = [segments[i] for i in part.indices]
        part.backend.scale_(part.grads, own, factors.to(part.device), zero_fill=nonfinite == "zero")
    return norms


def _all_finite(norms: Tensor) -> Tensor:
    """0 when all are finite, else NaN."""
    return (norms - norms).sum()
