"""reduce: sums of this process → the total over meshes and a process group.

With R ranks that hold the same values of a gradient g,

    total² = Σ over ranks of Σ over gradients of |g_local|² / R

so one addition over the ranks of a mesh serves every mix of placements on it. What travels is one
fp64 value for each norm and domain (set of ranks, see ``topology``). Maxima need no division.
"""

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.backends.reference import operation_of
from fusedclip.rule import Segments
from fusedclip.sharded.placements import Holder
from fusedclip.sharded.topology import Topology, device_for, topology

_T = TypeVar("_T")
_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Total:
    """Totals over ranks, with the values that they are made of, to find where a NaN comes from."""

    value: Tensor  # fp64 [num_segments]
    domain_values: list[Tensor]  # [num_domains] of fp64 [num_segments]
    found: Topology
    inside: AbstractSet[int]  # the domains that only the process group adds up
    process_group: Any

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def exchange(self, items: list[_T]) -> list[_T]:
        """``items`` of this rank and of all ranks that share a value with it which is not finite.

        The value is the same on all of these ranks, so either all of them take part in the exchange
        or none does.
        """
        steps = [
            (value, step.group)
            for index, value in enumerate(self.domain_values)
            for step in self.found.steps
            if index in step.domains and index not in self.inside
        ]
        if self.process_group is not None:
            steps.append((self.value, self.process_group))
        for value, group in steps:
            if not bool(value.isfinite().all()):
                items = list(dict.fromkeys(all_gather(items, group)))
        return items


def reduce(
    sums: Tensor,
    holders: Sequence[Holder],
    rows: Segments,
    process_group: Any,
    order: float,
    *,
    of_norms: bool = False,
) -> Total:
    """Add up (or take the extremes of) ``sums`` over the ranks of the holders' meshes.

    Then over ``process_group``, each of whose ranks holds gradients of its own. A mesh that lies
    within the group is added up by the group alone, and a mesh that has several ranks in the group
    still counts once.

    Args:
        sums: fp64 ``[len(holders)]``: ``reference.power_sum`` of what this process has.
        rows: the norm that each of them counts towards.
        of_norms: they are those of whole tensors, as ``reduce_each`` gives them, for an order that
            has no sums of parts.
    """
    operation = operation_of(order)
    found = topology(holder.mesh for holder in holders if holder.mesh is not None)
    if of_norms and order == 0.0:
        sums = (sums != 0.0).to(torch.float64)  # torch counts the tensors that are not zero
    elif not of_norms and operation == "sum":
        sums = _shares(sums, holders)
    values, own = _per_domain(sums, holders, rows, found, order)
    members = set() if process_group is None else set(dist.get_process_group_ranks(process_group))
    inside: AbstractSet[int] = frozenset()
    if not of_norms:
        inside = {i for i, domain in enumerate(found.domains) if members.issuperset(domain)}
        values = _all_reduce_domains(values, found, operation, inside)

    combine = {"max": torch.maximum, "min": torch.minimum}.get(operation, torch.add)
    total = own
    for index, (value, domain) in enumerate(zip(values, found.domains, strict=True)):
        if members and operation == "sum" and index not in inside:
            value = value / len(members.intersection(domain))
        total = value if total is None else combine(total, value)
    if total is None:
        total = reference.nothing(sums, rows.count, order)
    if process_group is not None:
        total = all_reduce(total.clone(), operation, process_group)
    return Total(total, values, found, inside, process_group)


def reduce_each(powers: Tensor, holders: Sequence[Holder], order: float) -> Tensor:
    """The power sums of whole tensors from those of this process: fp64 ``[len(holders)]`` each.

    Every rank of a mesh must have its entries in the same number and order.
    """
    found = topology(holder.mesh for holder in holders if holder.mesh is not None)
    operation = operation_of(order)
    if operation == "sum":
        powers = _shares(powers, holders)
    places: list[list[int]] = [[] for _ in found.domains]
    for place, holder in enumerate(holders):
        if holder.mesh is not None:
            places[found.position[holder.mesh]].append(place)
    indices = [_moved(torch.tensor(entries, device="cpu"), powers) for entries in places]
    values = _all_reduce_domains([powers[index] for index in indices], found, operation)
    powers = powers.clone()
    for index, value in zip(indices, values, strict=True):
        powers[index] = value
    return powers


def all_reduce(values: Tensor, operation: str, group: Any) -> Tensor:
    """``values`` over the ranks of ``group``; they may be overwritten.

    Values on a device that the group does not serve (offloaded gradients) travel there and back.
    """
    moved = values.to(device_for(group, values.device))
    op = getattr(dist.ReduceOp, operation.upper())
    if operation == "sum":
        collective(dist.all_reduce, moved, op=op, group=group)
        return moved.to(values.device)
    # A maximum over ranks may drop a NaN, and on some ranks only: a second value marks it.
    flag = 1.0 if operation == "max" else -1.0
    flagged = torch.stack([moved.where(~moved.isnan(), -flag * math.inf), flag * moved.isnan()])
    collective(dist.all_reduce, flagged, op=op, group=group)
    return flagged[0].where(flagged[1] == 0.0, math.nan).to(values.device)


def all_gather(items: list[_T], group: Any) -> list[_T]:
    """The items of all ranks of ``group``, by rank.

    torch.distributed.all_gather_object makes tensors of its own, which ``_lent`` cannot look after.
    """
    mine = torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8)
    size = torch.tensor([mine.numel()], dtype=torch.float64, device="cpu")
    longest = int(all_reduce(size, "max", group))
    start = group.rank() * longest
    everyone = torch.zeros(
        group.size() * longest, dtype=torch.uint8, device=device_for(group, mine.device)
    )
    everyone[start : start + mine.numel()] = mine  # and zero of all others: the sum gathers
    collective(dist.all_reduce, everyone, op=dist.ReduceOp.SUM, group=group)
    # What follows the end of a pickle is not read.
    parts = (bytes(part.tolist()) for part in torch.split(everyone.cpu(), longest))
    return [item for part in parts for item in pickle.loads(part)]


def check_process_group(group: Any) -> None:
    """Raises TypeError or ValueError unless this rank can reduce over ``group``."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup, got "
            f"{type(group).__name__}; a dimension of a DeviceMesh gives one by mesh.get_group(dim)"
        )


def _shares(sums: Tensor, holders: Sequence[Holder]) -> Tensor:
    """Each sum divided by the number of ranks that hold the same values."""
    if all(holder.replicas <= 1 for holder in holders):
        return sums
    replicas = [float(max(1, holder.replicas)) for holder in holders]
    return sums / _moved(torch.tensor(replicas, dtype=torch.float64, device="cpu"), sums)


def _per_domain(
    sums: Tensor, holders: Sequence[Holder], rows: Segments, found: Topology, order: float
) -> tuple[list[Tensor], Tensor | None]:
    """The values of each domain, [rows.count] each, and those that belong to no mesh (or None)."""
    places: list[list[int]] = [[] for _ in range(len(found.domains) + 1)]
    for place, holder in enumerate(holders):
        if holder.replicas:
            places[-1 if holder.mesh is None else found.position[holder.mesh]].append(place)
    values = []
    for members in places if places[-1] else places[:-1]:
        own = sums
        if len(members) < len(holders):
            own = sums[_moved(torch.tensor(members, device="cpu", dtype=torch.int64), sums)]
        segments = None if rows.of is None else [rows.of[place] for place in members]
        values.append(reference.combined(own, Segments(segments, rows.count), order))
    return values[: len(found.domains)], values[-1] if places[-1] else None


def _moved(host: Tensor, like: Tensor) -> Tensor:
    return host.to(like.device, non_blocking=True)  # from the CPU, without waiting for the device


def _all_reduce_domains(
    values: Sequence[Tensor], found: Topology, operation: str, without: AbstractSet[int] = _NONE
) -> list[Tensor]:
    """``values[i]``, a vector, over the ranks of ``found.domains[i]``: one all-reduce a step."""
    values = list(values)
    for step in found.steps:
        members = [i for i in step.domains if i not in without]
        if len(members) == 1:
            values[members[0]] = all_reduce(values[members[0]], operation, step.group)
        elif members:
            sizes = [values[i].numel() for i in members]
            packed = all_reduce(torch.cat([values[i] for i in members]), operation, step.group)
            for i, value in zip(members, torch.split(packed, sizes), strict=True):
                values[i] = value
    return values


def collective(call: Callable[..., Any], *arguments: Any, group: Any, **options: Any) -> None:
    """``call`` over ``group``; its error gets the ranks that wait, and the likely reason."""
    try:
        with _lent(arguments) as lent:
            call(*lent, group=group, **options)
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"rank {dist.get_rank()}: adding up the gradient norm over ranks "
            f"{_short(ranks)} failed: {error}\nAnother of these ranks raised an error before its "
            "norm, ended, or does not clip in this step. Look at its own error first; every rank "
            "of a mesh has to clip at least one parameter of it, even one without gradient"
        ) from error


# What a thread of torch may still hold, by id: tensors whose .grad is what was lent.
_on_loan: dict[int, Tensor] = {}


@contextmanager
def _lent(arguments: Sequence[Any]) -> Iterator[list[Any]]:
    """The arguments, each tensor as an alias that stays until the group's thread has let go of it.

    gloo's thread drops its reference to a tensor at some time after the collective has returned. If
    that leaves the Python object alone, or nothing, the thread takes the GIL for it; and where the
    interpreter is ending meanwhile, the process dies of SIGABRT. Keeping the Python object is
    not enough: C++ must keep a reference as well, which the ``grad`` of another tensor is. The
    tensors themselves may be handed on, with references of others, so aliases travel.
    """
    lent = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
    holders = []
    for each in lent:
        if isinstance(each, Tensor):
            holders.append(each.detach())
            holders[-1].grad = each
    try:
        yield lent
    finally:
        _on_loan.update((id(holder), holder) for holder in holders)
        for key, holder in list(_on_loan.items()):
            alias: Any = holder.grad
            if alias is None or alias._use_count() <= _OWN_REFERENCES:
                _on_loan.pop(key, None)


_OWN_REFERENCES = 2  # of C++ to a tensor: its Python object's and that of the holder's grad


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"[{shown}]" if len(ranks) <= 8 else f"[{shown}, … {len(ranks)} in all]"
