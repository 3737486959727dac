"""After gather: measure → reduce → decide → scale, by segment.

The global norm is a vector of length 1. In a single process whose gradients are all dense and on
one device the four steps are one native call, ``fused``, if the thresholds are known before the
norms; else they follow one another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedclip import decision
from fusedclip.backends import reference
from fusedclip.errors import Culprit, NonfiniteGradientError
from fusedclip.gradients import Gradients
from fusedclip.parameters import Parameters, parameter_names
from fusedclip.rule import GLOBAL, Rule, Segments, may_write
from fusedclip.sharded.placements import LOCAL, Holder

if TYPE_CHECKING:
    # Imported where gradients are reduced, so that a single process does not wait for it.
    from fusedclip.sharded.reduce import Total


@dataclass
class Unscale:
    """The gradients are of a scaled loss: each value counts times 1 / loss scale."""

    inv_scale: Tensor  # fp32 scalar
    allow_float16: bool = True  # False: as torch's scaler, refuse gradients in half precision
    write: bool = True  # False: they are clipped by their true norm and stay scaled
    # Set to 1 when a norm (of an order > 0) is not finite: fp32 scalar on the first gradient's
    # device, made by the clip; None where there was no gradient.
    found_inf: Tensor | None = None

    def prepare(self, tensors: Sequence[Tensor], grads: Gradients, process_group: Any) -> None:
        """Get ready for these gradients.

        Raises:
            ValueError: one is in half precision, and that is not allowed.
        """
        if not self.allow_float16 and grads.any_float16:
            index = next(index for index, grad in grads.tensors() if grad.dtype == torch.float16)
            raise ValueError(
                f"Attempting to unscale FP16 gradients. The first is grads[{index}] of shape "
                f"{tuple(tensors[index].shape)}; keep parameters in float32 and leave the casts "
                "to torch.autocast"
            )
        if not grads.empty or process_group is not None:
            self.inv_scale = self.inv_scale.to(grads.device, non_blocking=True)
            self.found_inf = torch.zeros((), dtype=torch.float32, device=grads.device)


@dataclass
class Record:
    """What a clip leaves behind for a monitor, at no pass of its own."""

    tensor_norms: Tensor  # fp64 [len(parameters)] on the first gradient's device, overwritten:
    #                       the norm of each whole gradient, 0 where there is none
    norm: Tensor | float | None = None  # before clipping; also when it makes the clip raise
    threshold: float | Tensor = math.inf  # what it was compared with
    skip: Tensor | None = None  # whether the step is to be left out


@dataclass(eq=False, repr=False)
class Outcome:
    """What a clip came to."""

    norms: Tensor  # before clipping: 0-dim, or [num_segments] where the segments are not global
    threshold: float | Tensor  # what they were compared with
    coefficients: Tensor | None = None  # fp64 [num_segments], of a clip that does not write
    skip: Tensor | None = None  # bool, 0-dim: leave the step out; None: whatever the norms, take it


def run(
    parameters: Parameters,
    grads: Gradients,
    rule: Rule,
    unscale: Unscale | None = None,
    record: Record | None = None,
    *,
    write: bool = True,
) -> Outcome:
    """Everything after gather.

    Args:
        parameters: what the user gave, which may know names.
        unscale: unscale in the same pass.
        record: to be filled in the same pass.
        write: False leaves the gradients to the caller, who applies the coefficients.
    """
    if grads.empty and rule.process_group is None:
        return _nothing(rule, record, write)
    limits = decision.known_before(rule, grads.device) if write else None
    norms = None if limits is None else _fused(grads, rule, limits, unscale, record)
    if norms is not None and limits is not None:
        if rule.nonfinite == "error":
            raise_if_nonfinite(norms, grads, rule.norm_type, parameters)
        return _recorded(record, Outcome(norms, limits, skip=decision.after(rule, norms, limits)))
    with torch.no_grad():
        norms, total = _norms(grads, rule, unscale, record)
        if rule.nonfinite == "error":
            raise_if_nonfinite(norms, grads, rule.norm_type, parameters, total)
        decided = decision.decide(rule, norms)
        limits, factors = decided.thresholds, decided.coefficients
        if not write:
            return _recorded(record, Outcome(norms, limits, factors, decided.skip))
        unscales = unscale is not None and unscale.write
        # Else not even a launch that would find nothing to do.
        if may_write(limits, rule.nonfinite, unscaled=unscales):
            if unscale is not None and unscales:
                factors = factors * unscale.inv_scale
            scale_(grads, factors, rule.segments, zero_fill=rule.nonfinite == "zero")
    return _recorded(record, Outcome(norms, limits, skip=decided.skip))


def _recorded(record: Record | None, outcome: Outcome) -> Outcome:
    if record is not None:
        record.threshold, record.skip = outcome.threshold, outcome.skip
    return outcome


def _nothing(rule: Rule, record: Record | None, write: bool) -> Outcome:
    """What a clip of no gradient at all comes to; a policy is not asked."""
    count = rule.segments.count
    if record is not None:
        record.tensor_norms.zero_()
        record.norm = 0.0
    norms = torch.zeros(count) if rule.by_segment else torch.tensor(0.0)
    limit = rule.max_norm if isinstance(rule.max_norm, (float, Tensor)) else math.inf
    skip = None if rule.skip_above is None else torch.zeros((), dtype=torch.bool)
    return Outcome(norms, limit, None if write else torch.ones(count, dtype=torch.float64), skip)


def _fused(
    grads: Gradients,
    rule: Rule,
    limits: float | Tensor,
    unscale: Unscale | None,
    record: Record | None,
) -> Tensor | None:
    """The norms, all steps done in one native call; else ``None``.

    ``None`` where not one backend has all gradients, or it has no fused form of this.
    """
    part = grads.sole
    if part is None or rule.process_group is not None or not _summable(grads, rule):
        return None
    if unscale is not None and not unscale.write:
        return None
    # Where each parameter has a norm of its own, those are what a record wants.
    each = isinstance(rule.segments.of, range)
    own = None if record is None or each else record.tensor_norms
    if own is not None and len(part) != own.numel():
        own = torch.empty(len(part), dtype=torch.float64, device=part.device)
    norms = part.backend.clip_(
        part,
        limits,
        segments=_picked(rule.segments.of, part.indices),
        infinity=rule.infinity,
        nonfinite=rule.nonfinite,
        inv_scale=None if unscale is None else unscale.inv_scale,
        found_inf=None if unscale is None else unscale.found_inf,
        tensor_norms=own,
    )
    if norms is not None and record is not None:
        if each:
            record.tensor_norms.copy_(norms)
        elif own is not record.tensor_norms and own is not None:
            places = torch.tensor(part.indices, device="cpu").to(part.device, non_blocking=True)
            record.tensor_norms.zero_().index_copy_(0, places, own)
        record.norm, record.threshold = norms, limits  # also of a clip that is about to raise
    return norms  # type: ignore[no-any-return]


def _picked(of: Sequence[int] | None, indices: Sequence[int]) -> Sequence[int] | None:
    if of is None or (isinstance(of, range) and len(of) == len(indices)):
        return of  # a gradient for each
    return [of[index] for index in indices]


def _summable(grads: Gradients, rule: Rule) -> bool:
    """Whether the norms are made of Σ|g|² or max|g| of all elements, as the kernels give them."""
    # torch has no infinity norm for an empty tensor; to the strict functions it adds nothing.
    return rule.norm_type == 2.0 or (rule.infinity and (rule.strict or not grads.any_empty_tensor))


def _norms(
    grads: Gradients, rule: Rule, unscale: Unscale | None, record: Record | None
) -> tuple[Tensor, "Total | None"]:
    """measure and reduce: the norms as the user is given them, and what ranks made them of."""
    order, summable = rule.norm_type, _summable(grads, rule)
    each_tensor = record is not None or not summable
    length = grads.length if record is None else record.tensor_norms.numel()
    sums = _sums_of_tensors(grads, rule, length) if each_tensor else _sums_of_segments(grads, rule)
    whole = sums.values
    if each_tensor and grads.shards is not None:
        from fusedclip.sharded import reduce

        whole = reduce.reduce_each(sums.values, sums.holders, order)
    if record is not None:
        record.tensor_norms.copy_(reference.norm_of_power_sum(whole, order))

    total = None
    if grads.shards is None and rule.process_group is None:
        if not summable and not rule.by_segment:
            norms = reference.total_norm([grad for _, grad in grads.tensors()], order).reshape(1)
        else:
            if each_tensor:
                whole = reference.combined(whole, sums.segments, order, of_norms=not summable)
            norms = reference.norm_of_power_sum(whole, order)
    else:
        from fusedclip.sharded import reduce

        values = sums.values if summable else whole
        total = reduce.reduce(
            values, sums.holders, sums.segments, rule.process_group, order, of_norms=not summable
        )
        norms = reference.norm_of_power_sum(total.value, order)

    if unscale is not None:
        norms = norms * unscale.inv_scale  # ‖g·s‖ = ‖g‖·s, while it is fp64
        if record is not None:
            record.tensor_norms.mul_(unscale.inv_scale)
    norms = norms.to(grads.norm_dtype)
    if unscale is not None and unscale.found_inf is not None:
        unscale.found_inf.copy_(~norms.isfinite().all())
    if not rule.by_segment:
        norms = norms[0]
    if record is not None:
        record.norm = norms
    return norms, total


@dataclass(eq=False, repr=False)
class _Sums:
    """What this process has measured: Σ|g|^p (or extremes) of gradients that belong together."""

    values: Tensor  # fp64 [num_sums] on the first gradient's device
    holders: list[Holder]  # [num_sums]: the ranks that hold the same or other parts
    segments: Segments  # the norm that each of them counts towards


def _sums_of_segments(grads: Gradients, rule: Rule) -> _Sums:
    """One sum for each segment and each kind of holder: as few as there can be."""
    of, count, shards = rule.segments.of, rule.segments.count, grads.shards
    if shards is None:
        values = _measured(grads, rule.norm_type, of, count)
        segments = GLOBAL if of is None else Segments(range(count), count)
        return _Sums(values, [LOCAL] * count, segments)
    kinds = len(shards.holders)
    if of is None and kinds == 1 and not shards.partial and shards.is_measured(0):
        return _Sums(_measured(grads, rule.norm_type, None, 1), shards.holders, GLOBAL)

    def row(index: int, kind: int) -> int:
        return kind if of is None else of[index] * kinds + kind

    rows = [
        row(index, kind) if shards.is_measured(index) else reference.NOT_COUNTED
        for index, kind in enumerate(shards.kinds)
    ]
    pending = [row(each.index, shards.holders.index(each.holder)) for each in shards.partial]
    values = _measured(grads, rule.norm_type, rows, kinds * count, pending)
    segments = GLOBAL if of is None else Segments([i // kinds for i in range(len(values))], count)
    return _Sums(values, shards.holders * count, segments)


def _sums_of_tensors(grads: Gradients, rule: Rule, length: int) -> _Sums:
    """One sum for each position in the list; 0 where there is no gradient that counts."""
    shards = grads.shards
    if shards is None:
        values = _measured(grads, rule.norm_type, range(length), length)
        return _Sums(values, [LOCAL] * length, rule.segments)
    rows = [i if shards.is_measured(i) else reference.NOT_COUNTED for i in range(length)]
    pending = [each.index for each in shards.partial]
    values = _measured(grads, rule.norm_type, rows, length, pending)
    return _Sums(values, shards.holders_by_position(), rule.segments)


def tensor_powers(grads: Gradients, order: float, length: int) -> Tensor:
    """``reference.power_sum`` of each whole tensor, fp64 ``[length]`` by position."""
    sums = _sums_of_tensors(grads, Rule(math.inf, order), length)
    if grads.shards is None:
        return sums.values
    from fusedclip.sharded import reduce

    return reduce.reduce_each(sums.values, sums.holders, order)


def _measured(
    grads: Gradients,
    order: float,
    rows: Sequence[int] | None,
    num_rows: int,
    pending: Sequence[int] = (),
) -> Tensor:
    """measure: ``reference.power_sum`` by row, fp64 ``[num_rows]`` on the first gradient's device.

    Args:
        rows: of each entry of the list, or ``NOT_COUNTED``; ``None``: all are of 0. With an order
            other than 2 and inf each has one of its own.
        pending: the rows of ``grads.shards.partial``.
    """
    if order in (2.0, math.inf):
        sums = _measured_by_kernels(grads, order == math.inf, rows, num_rows)
    else:
        nothing = math.inf if order == -math.inf else 0.0
        sums = torch.full((num_rows,), nothing, dtype=torch.float64, device=grads.device)
        for index, grad in grads.tensors():
            row = 0 if rows is None else rows[index]
            # A shard may be empty; torch says for which orders a whole tensor may be.
            if row != reference.NOT_COUNTED and (grad.numel() or grads.shards is None):
                sums[row] = reference.power_sum(grad, order)
    if pending and grads.shards is not None:
        from fusedclip.sharded.partial import measure_partial

        measure_partial(grads.shards, pending, order, sums)
    return sums


def _measured_by_kernels(
    grads: Gradients, infinity: bool, rows: Sequence[int] | None, num_rows: int
) -> Tensor:
    total = None
    for part in grads.parts:
        out = torch.empty(num_rows, dtype=torch.float64, device=part.device)
        own = _picked(rows, part.indices)
        part.backend.measure(part, own, infinity=infinity, out=out)
        if total is None:
            total = out
        else:
            out = out.to(total.device, non_blocking=True)
            total = torch.maximum(total, out) if infinity else total + out
    if total is None:
        return torch.zeros(num_rows, dtype=torch.float64, device=grads.device)
    return total


def scale_(
    grads: Gradients, factors: Tensor, segments: Segments = GLOBAL, *, zero_fill: bool = False
) -> None:
    """Multiply each gradient by the factor of its segment, fp64 ``[num_segments]``."""
    for part in grads.parts:
        own = _picked(segments.of, part.indices)
        part.backend.scale_(part, own, factors.to(part.device), zero_fill=zero_fill)


def raise_if_nonfinite(
    norms: Tensor,
    grads: Gradients,
    order: float,
    parameters: Parameters,
    total: "Total | None" = None,
) -> None:
    """Raises NonfiniteGradientError, with the gradients of all ranks that are to blame."""
    if not bool(norms.isfinite().all()):
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
