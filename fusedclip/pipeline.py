"""The pipeline after gather: measure → reduce → decide → scale, readable top to bottom.

In a single process whose gradients are all dense and on one device it is one native call.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, reference, triton
from fusedclip.errors import Culprit, NonfiniteGradientError
from fusedclip.gradients import Gradients, Parameters, parameter_name
from fusedclip.sharding import LOCAL

if TYPE_CHECKING:
    # Imported where gradients are reduced, so that a single process does not wait for it.
    from fusedclip import distributed


class Adaptive(Protocol):
    """A threshold that follows the norms: ``policies.AutoClip``, ``policies.ZClip``."""

    def threshold(self, norm: Tensor) -> Tensor:
        """The threshold for a step with this norm, a 0-dim fp64 tensor on the norm's device."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def threshold(max_norm: float | Tensor | Adaptive, norm: Tensor) -> float | Tensor:
    """The threshold of a step with this norm; a policy takes the norm into its history."""
    return max_norm if isinstance(max_norm, (float, Tensor)) else max_norm.threshold(norm)


def clip_gathered(
    parameters: Parameters,
    grads: Gradients,
    max_norm: float | Tensor | Adaptive,
    order: float,
    nonfinite: str,
    process_group: Any,
    strict: bool,
) -> Tensor:
    """Everything after gather; the norm before clipping.

    Args:
        parameters: what the user gave, which may know names.
        max_norm: ``inf`` measures and never writes; a policy is asked once the norm is known.
        order: p of the p-norm.
        strict: an empty tensor has an infinity norm of 0; else that is torch's error.
    """
    infinity = order == math.inf
    alone = grads.shards is None and process_group is None
    # torch has no infinity norm for an empty tensor; to the strict functions it adds nothing.
    summable = order == 2.0 or (infinity and (strict or not grads.any_empty_tensor))
    if summable and alone and isinstance(max_norm, (float, Tensor)):
        norm = _fused_clip_(grads, max_norm, infinity, nonfinite)
        if norm is not None:
            if nonfinite == "error":
                raise_if_nonfinite(norm, grads, order, parameters)
            return norm
    if grads.empty and process_group is None:
        return torch.tensor(0.0)
    with torch.no_grad():
        if summable:
            total = _total(grads, infinity, process_group)
            norm = total.value if infinity else total.value.sqrt()
        elif alone:
            norm, total = reference.total_norm([grad for _, grad in grads.tensors()], order), None
        else:
            total = _total_of_norms(grads, order, process_group)
            norm = reference.norm_of_power_sum(total.value, order)
        norm = norm.to(grads.norm_dtype)
        if nonfinite == "error":
            raise_if_nonfinite(norm, grads, order, parameters, None if alone else total)
        zero = nonfinite == "zero"
        limit = threshold(max_norm, norm)
        factor = reference.coefficient(norm.reshape(1), limit, zero_nonfinite=zero)
        scale_(grads, factor, zero_fill=zero)
    return norm


def measure_norm(grads: Gradients, order: float, process_group: Any) -> Tensor:
    """The norm alone, fp64 and 0-dim, on the first gradient's device; one read."""
    infinity = order == math.inf
    if order == 2.0 or infinity:
        total = _total(grads, infinity, process_group).value
        return total if infinity else total.sqrt()
    return reference.norm_of_power_sum(_total_of_norms(grads, order, process_group).value, order)


def _fused_clip_(
    grads: Gradients, max_norm: float | Tensor, infinity: bool, nonfinite: str
) -> Tensor | None:
    """Everything in one native call, where one backend has all gradients; else ``None``."""
    if grads.only_cpu and isinstance(max_norm, float):
        return cpu.clip_(grads.cpu, max_norm, infinity=infinity, nonfinite=nonfinite)
    if grads.only_one_gpu:
        if grads.cuda:
            return cuda.clip_(grads.cuda[0], max_norm, infinity=infinity, nonfinite=nonfinite)
        return triton.clip_(grads.triton[0], max_norm, infinity=infinity, nonfinite=nonfinite)
    return None


def _total(grads: Gradients, infinity: bool, process_group: Any) -> "distributed.Total":
    """Σ|g|² or max|g| over all ranks."""
    from fusedclip import distributed

    holders = [LOCAL] if grads.shards is None else grads.shards.holders
    segments = None if grads.shards is None else grads.shards.segments
    sums = _measure(grads, infinity, segments, len(holders))
    if grads.shards is not None and grads.shards.partial:
        from fusedclip.partial import measure_partial

        order = math.inf if infinity else 2.0
        measure_partial(grads.shards, order=order, per_tensor=False, sums=sums)
    return distributed.reduce(sums, holders, process_group, infinity=infinity)


def _total_of_norms(grads: Gradients, order: float, process_group: Any) -> "distributed.Total":
    """What a norm of any order is made of, over all ranks: torch's norm of the tensors' norms."""
    from fusedclip import distributed

    if grads.shards is None:
        powers = tensor_powers(grads, order, 1 + max((i for i, _ in grads.tensors()), default=0))
        holders = [LOCAL] * len(powers)
    else:
        powers = tensor_powers(grads, order, len(grads.shards.segments))
        holders = grads.shards.segment_holders()
    return distributed.reduce_norms(powers, holders, process_group, order)


def tensor_powers(grads: Gradients, order: float, length: int) -> Tensor:
    """``reference.power_sum`` of each whole tensor, fp64 ``[length]`` by position."""
    if order in (2.0, math.inf):
        powers = _measure(grads, order == math.inf, range(length), length)
    else:
        nothing = math.inf if order == -math.inf else 0.0
        powers = torch.full((length,), nothing, dtype=torch.float64, device=grads.device)
        for index, grad in grads.tensors():
            # A shard may be empty; torch says for which orders a whole tensor may be.
            if grad.numel() or grads.shards is None:
                powers[index] = reference.power_sum(grad, order)
    if grads.shards is None:
        return powers
    from fusedclip import distributed
    from fusedclip.partial import measure_partial

    measure_partial(grads.shards, order=order, per_tensor=True, sums=powers)
    return distributed.reduce_each(powers, grads.shards.segment_holders(), order)


def _measure(
    grads: Gradients, infinity: bool, segments: Sequence[int] | None, num_segments: int
) -> Tensor:
    """Σ|g|² or max|g| per segment, fp64 ``[num_segments]`` on the first gradient's device.

    Args:
        segments: of each gradient, by its position in ``parameters``; ``None``: all are of 0.
    """
    total = None
    for part in grads.parts:
        out = torch.empty(num_segments, dtype=torch.float64, device=part.device)
        own = (
            None
            if segments is None or num_segments == 1
            else [segments[index] for index in part.indices]
        )
        part.backend.measure(part.grads, own, infinity=infinity, out=out)
        if total is None:
            total = out
        else:
            out = out.to(total.device, non_blocking=True)
            total = torch.maximum(total, out) if infinity else total + out
    if total is None:
        return torch.zeros(num_segments, dtype=torch.float64, device=grads.device)
    return total


def scale_(grads: Gradients, factor: Tensor, zero_fill: bool) -> None:
    for part in grads.parts:
        part.backend.scale_(part.grads, None, factor.to(part.device), zero_fill=zero_fill)


def raise_if_nonfinite(
    norm: Tensor,
    grads: Gradients,
    order: float,
    parameters: Parameters,
    total: "distributed.Total | None" = None,
) -> None:
    if not bool(norm.isfinite()):
        culprits = _culprits(grads, parameters, None if total is None else total.rank)
        raise NonfiniteGradientError(order, culprits if total is None else total.exchange(culprits))


def _culprits(grads: Gradients, parameters: Parameters, rank: int | None) -> list[Culprit]:
    bad = grads.nonfinite_indices()
    return [
        Culprit(index, grads.shape(index, grad), parameter_name(parameters, index), rank)
        for index, grad in grads.tensors()
        if index in bad
    ]
