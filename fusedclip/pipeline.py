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


@dataclass(frozen=True)
class Unscale:
    """The gradients are of a scaled loss: each value counts times ``inv_scale``."""

    inv_scale: Tensor  # 1 / loss scale, fp32 scalar on the first gradient's device
    found_inf: Tensor  # set to 1 when the norm (of an order > 0) is not finite, fp32 scalar too


def clip_gathered(
    parameters: Parameters,
    grads: Gradients,
    max_norm: float | Tensor | Adaptive,
    order: float,
    nonfinite: str,
    process_group: Any,
    strict: bool,
    unscale: Unscale | None = None,
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
    """
    infinity = order == math.inf
    alone = grads.shards is None and process_group is None
    if alone and isinstance(max_norm, (float, Tensor)) and _summable(grads, order, strict):
        norm = _fused_clip_(grads, max_norm, infinity, nonfinite, unscale)
        if norm is not None:
            if nonfinite == "error":
                raise_if_nonfinite(norm, grads, order, parameters)
            return norm
    if grads.empty and process_group is None:
        return torch.tensor(0.0)
    with torch.no_grad():
        norm, total = _norm(grads, order, process_group, strict, unscale)
        if nonfinite == "error":
            raise_if_nonfinite(norm, grads, order, parameters, total)
        limit = threshold(max_norm, norm)
        never = not isinstance(limit, Tensor) and limit == math.inf
        if never and nonfinite != "zero" and unscale is None:
            return norm  # not even a launch that would find nothing to do, and bump the versions
        factor = _coefficient(norm, limit, nonfinite)
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
) -> tuple[Tensor, Tensor]:
    """The norm and the coefficient (fp64 ``[1]``), for those who apply it on a pass of their own:
    no gradient is written. Arguments as of ``clip_gathered``."""
    with torch.no_grad():
        norm, total = _norm(grads, order, process_group, True, unscale)
        if nonfinite == "error":
            raise_if_nonfinite(norm, grads, order, parameters, total)
        return norm, _coefficient(norm, threshold(max_norm, norm), nonfinite)


def _fused_clip_(
    grads: Gradients,
    max_norm: float | Tensor,
    infinity: bool,
    nonfinite: str,
    unscale: Unscale | None,
) -> Tensor | None:
    """Everything in one native call, where one backend has all gradients; else ``None``."""
    if grads.only_cpu and isinstance(max_norm, float):
        return cpu.clip_(
            grads.cpu,
            max_norm,
            infinity=infinity,
            nonfinite=nonfinite,
            inv_scale=1.0 if unscale is None else unscale.inv_scale.item(),
            found_inf=None if unscale is None else unscale.found_inf,
        )
    if grads.only_one_gpu:
        options: dict[str, Any] = {"infinity": infinity, "nonfinite": nonfinite}
        if unscale is not None:
            options |= {"inv_scale": unscale.inv_scale, "found_inf": unscale.found_inf}
        if grads.cuda:
            return cuda.clip_(grads.cuda[0], max_norm, **options)
        return triton.clip_(grads.triton[0], max_norm, **options)
    return None


def _summable(grads: Gradients, order: float, strict: bool) -> bool:
    """Whether the norm is made of Σ|g|² or max|g| of all elements, as the kernels give them."""
    # torch has no infinity norm for an empty tensor; to the strict functions it adds nothing.
    return order == 2.0 or (order == math.inf and (strict or not grads.any_empty_tensor))


def _norm(
    grads: Gradients, order: float, process_group: Any, strict: bool, unscale: Unscale | None
) -> tuple[Tensor, "distributed.Total | None"]:
    """measure and reduce: the norm as the user is given it, and what it is made of if of ranks."""
    infinity = order == math.inf
    total = None
    if grads.shards is None and process_group is None:
        if _summable(grads, order, strict):
            power = _measure(grads, infinity, None, 1)[0]
            norm = power if infinity else power.sqrt()
        else:
            norm = reference.total_norm([grad for _, grad in grads.tensors()], order)
    elif _summable(grads, order, strict):
        total = _total(grads, infinity, process_group)
        norm = total.value if infinity else total.value.sqrt()
    else:
        total = _total_of_norms(grads, order, process_group)
        norm = reference.norm_of_power_sum(total.value, order)
    if unscale is not None:
        norm = norm * unscale.inv_scale  # ‖g·s‖ = ‖g‖·s, while it is fp64
    norm = norm.to(grads.norm_dtype)
    if unscale is not None:
        unscale.found_inf.copy_(~norm.isfinite())
    return norm, total


def _coefficient(norm: Tensor, max_norm: float | Tensor, nonfinite: str) -> Tensor:
    """decide: fp64 ``[1]``."""
    norm = norm.reshape(1)
    factor = reference.coefficient(norm, max_norm, zero_nonfinite=nonfinite == "zero")
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
