"""The pipeline after gather: measure → reduce → decide → scale, readable top to bottom.

In a single process whose gradients are all dense and on one device it is one native call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, reference, triton
from fusedclip.errors import Culprit, NonfiniteGradientError
from fusedclip.gradients import Gradients, Parameters, parameter_names
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


@dataclass(frozen=True)
class Unscale:
    """The gradients are of a scaled loss: each value counts times ``inv_scale``."""

    inv_scale: Tensor  # 1 / loss scale, fp32 scalar on the first gradient's device
    found_inf: Tensor  # set to 1 when the norm (of an order > 0) is not finite, fp32 scalar too


@dataclass
class Record:
    """What a clip leaves behind for a monitor, at no pass of its own."""

    tensor_norms: Tensor  # fp64 [len(parameters)] on the first gradient's device, overwritten:
    #                       the norm of each whole gradient, 0 where there is none
    norm: Tensor | float | None = None  # before clipping; also when it makes the clip raise
    threshold: float | Tensor = math.inf  # what it was compared with


def clip_gathered(
    parameters: Parameters,
    grads: Gradients,
    max_norm: float | Tensor | Adaptive,
    order: float,
    nonfinite: str,
    process_group: Any,
    strict: bool,
    unscale: Unscale | None = None,
    record: Record | None = None,
) -> Tensor:
    """Everything after gather; the norm before clipping.

    Args:
        parameters: what the user gave, which may know names.
        max_norm: ``inf`` measures and never writes (with ``unscale``: unscales alone); a policy is
            asked once the norm is known.
        order: p of the p-norm.
        nonfinite: a policy of ``clip_``, or ``"unclipped"``: a NaN or infinite norm clips nothing.
        strict: an empty tensor has an infinity norm of 0; else that is torch's error.
        unscale: unscale in the same pass.
        record: to be filled in the same pass.
    """
    infinity = order == math.inf
    alone = grads.shards is None and process_group is None
    if alone and isinstance(max_norm, (float, Tensor)) and _summable(grads, order, strict):
        norm = _fused_clip_(grads, max_norm, infinity, nonfinite, unscale, record)
        if norm is not None:
            if record is not None:
                record.norm, record.threshold = norm, max_norm
            if nonfinite == "error":
                raise_if_nonfinite(norm, grads, order, parameters)
            return norm
    if grads.empty and process_group is None:
        if record is not None:
            record.tensor_norms.zero_()
            record.norm = 0.0
        return torch.tensor(0.0)
    with torch.no_grad():
        norm, total = _norm(grads, order, process_group, strict, unscale, record)
        if nonfinite == "error":
            raise_if_nonfinite(norm, grads, order, parameters, total)
        limit = _threshold(max_norm, norm, record)
        never = not isinstance(limit, Tensor) and limit == math.inf
        if never and nonfinite != "zero" and unscale is None:
            return norm  # not even a launch that would find nothing to do, and bump the versions
        factor = coefficient(norm, limit, nonfinite)
        if unscale is not None:
            factor = factor * unscale.inv_scale
        scale_(grads, factor, zero_fill=nonfinite == "zero")
    return norm


def decide_gathered(
    parameters: Parameters,
    grads: Gradients,
    max_norm: float | Tensor | Adaptive,
    order: float,
    nonfinite: str,
    process_group: Any,
    unscale: Unscale | None,
    record: Record | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm and the coefficient (fp64 ``[1]``), for those who apply it on a pass of their own:
    no gradient is written. Arguments as of ``clip_gathered``."""
    with torch.no_grad():
        norm, total = _norm(grads, order, process_group, True, unscale, record)
        if nonfinite == "error":
            raise_if_nonfinite(norm, grads, order, parameters, total)
        return norm, coefficient(norm, _threshold(max_norm, norm, record), nonfinite)


def _fused_clip_(
    grads: Gradients,
    max_norm: float | Tensor,
    infinity: bool,
    nonfinite: str,
    unscale: Unscale | None,
    record: Record | None,
) -> Tensor | None:
    """Everything in one native call, where one backend has all gradients; else ``None``."""
    if grads.only_cpu and isinstance(max_norm, float):
        return cpu.clip_(
            grads.cpu,
            max_norm,
            infinity=infinity,
            nonfinite=nonfinite,
            inv_scale=1.0 if unscale is None else unscale.inv_scale.item(),
            tensor_norms=None if record is None else record.tensor_norms,
            found_inf=None if unscale is None else unscale.found_inf,
        )
    if grads.only_one_gpu:
        (part,) = grads.parts
        options: dict[str, Any] = {"infinity": infinity, "nonfinite": nonfinite}
        if unscale is not None:
            options |= {"inv_scale": unscale.inv_scale, "found_inf": unscale.found_inf}
        if record is not None:
            options["tensor_norms"] = own = torch.empty(
                len(part.indices), dtype=grads.norm_dtype, device=part.device
            )
        clip_ = cuda.clip_ if grads.cuda else triton.clip_
        norm = clip_(part.grads, max_norm, **options)
        if record is not None:
            _put(record.tensor_norms, part.indices, own)
        return norm
    return None


def _put(by_position: Tensor, indices: Sequence[int], values: Tensor) -> None:
    """``values`` to their positions, 0 elsewhere; on their device, without waiting for it."""
    if len(indices) == by_position.numel():
        by_position.copy_(values)
    else:
        places = torch.tensor(indices, device="cpu").to(values.device, non_blocking=True)
        by_position.zero_().index_copy_(0, places, values.to(by_position.dtype))


def _summable(grads: Gradients, order: float, strict: bool) -> bool:
    """Whether the norm is made of Σ|g|² or max|g| of all elements, as the kernels give them."""
    # torch has no infinity norm for an empty tensor; to the strict functions it adds nothing.
    return order == 2.0 or (order == math.inf and (strict or not grads.any_empty_tensor))


def _norm(
    grads: Gradients,
    order: float,
    process_group: Any,
    strict: bool,
    unscale: Unscale | None,
    record: Record | None,
) -> tuple[Tensor, "distributed.Total | None"]:
    """measure and reduce: the norm as the user is given it, and what it is made of if of ranks."""
    alone = grads.shards is None and process_group is None
    total = None
    if _summable(grads, order, strict):
        if record is not None:
            power, total = _recorded_power(grads, order, process_group, record)
        elif alone:
            power = _measure(grads, order == math.inf, None, 1)[0]
        else:
            total = _total(grads, order == math.inf, process_group)
            power = total.value
        norm = reference.norm_of_power_sum(power, order)
    else:
        if record is not None:  # the one case with a pass of its own
            powers = tensor_powers(grads, order, record.tensor_norms.numel())
            record.tensor_norms.copy_(reference.norm_of_power_sum(powers, order))
        if alone:
            norm = reference.total_norm([grad for _, grad in grads.tensors()], order)
        else:
            total = _total_of_norms(grads, order, process_group)
            norm = reference.norm_of_power_sum(total.value, order)
    if unscale is not None:
        norm = norm * unscale.inv_scale  # ‖g·s‖ = ‖g‖·s, while it is fp64
        if record is not None:
            record.tensor_norms.mul_(unscale.inv_scale)
    norm = norm.to(grads.norm_dtype)
    if unscale is not None:
        unscale.found_inf.copy_(~norm.isfinite())
    if record is not None:
        record.norm = norm
    return norm, total


def _recorded_power(
    grads: Gradients, order: float, process_group: Any, record: Record
) -> tuple[Tensor, "distributed.Total | None"]:
    """Σ|g|² or max|g| of all, made of those of single tensors, which the record keeps."""
    powers = _own_powers(grads, order, record.tensor_norms.numel())
    total = None
    if grads.shards is None and process_group is None:
        power = powers.amax() if order == math.inf else powers.sum()
    else:
        from fusedclip import distributed

        shards = grads.shards
        holders = [LOCAL] * len(powers) if shards is None else shards.segment_holders()
        total = distributed.reduce(powers, holders, process_group, infinity=order == math.inf)
        power = total.value
        if shards is not None:
            powers = distributed.reduce_each(powers, holders, order)
    record.tensor_norms.copy_(reference.norm_of_power_sum(powers, order))
    return power, total


def _threshold(
    max_norm: float | Tensor | Adaptive, norm: Tensor, record: Record | None
) -> float | Tensor:
    """That of this step; a policy takes the norm into its history."""
    limit = max_norm if isinstance(max_norm, (float, Tensor)) else max_norm.threshold(norm)
    if record is not None:
        record.threshold = limit
    return limit


def coefficient(norm: Tensor, limit: float | Tensor, nonfinite: str) -> Tensor:
    """decide: fp64 ``[1]``, or of each segment where there are several norms."""
    norm = norm.reshape(-1)
    factor = reference.coefficient(norm, limit, zero_nonfinite=nonfinite == "zero")
    if nonfinite == "unclipped":
        factor = torch.where(norm.isfinite(), factor, torch.ones_like(factor))
    return factor


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
    powers = _own_powers(grads, order, length)
    if grads.shards is None:
        return powers
    from fusedclip import distributed

    return distributed.reduce_each(powers, grads.shards.segment_holders(), order)


def _own_powers(grads: Gradients, order: float, length: int) -> Tensor:
    """What this process has of each tensor's power sum."""
    if order in (2.0, math.inf):
        powers = _measure(grads, order == math.inf, range(length), length)
    else:
        nothing = math.inf if order == -math.inf else 0.0
        powers = torch.full((length,), nothing, dtype=torch.float64, device=grads.device)
        for index, grad in grads.tensors():
            # A shard may be empty; torch says for which orders a whole tensor may be.
            if grad.numel() or grads.shards is None:
                powers[index] = reference.power_sum(grad, order)
    if grads.shards is not None:
        from fusedclip.partial import measure_partial

        measure_partial(grads.shards, order=order, per_tensor=True, sums=powers)
    return powers


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
    names = dict(enumerate(parameter_names(parameters) or ()))
    return [
        Culprit(index, grads.shape(index, grad), names.get(index), rank)
        for index, grad in grads.tensors()
        if index in bad
    ]
