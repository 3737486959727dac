"""Reads DTensors: the local values of each gradient, and which ranks hold the same values.

A list with DTensors is taken apart into local tensors, which the backends measure and scale like
any other, and one ``Holder`` for each kind of gradient, from which ``reduce`` knows how their
sums add up. Nothing is copied and nothing is communicated.
"""

import math
import sys
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# ([kind of each, -1: plain], [(index, the first of each kind)], [parameters without gradient])
Kinds = tuple[list[int], list[tuple[int, Any]], list[int]]

_SUMS = ("sum", "avg")  # pending reductions whose result is scaled when each summand is scaled


@dataclass(frozen=True)
class Holder:
    """The ranks that hold gradients of one kind: ``mesh``, each value on ``replicas`` of its ranks.

    Each rank divides its sum by ``replicas``, so that a sum over all ranks of the mesh counts every
    value once. Every replica enters it, so a NaN in one of them is seen by every rank.
    """

    mesh: Any = None  # a DeviceMesh; None: this process alone
    replicas: int = 1  # 0: counted on another rank, so not here


LOCAL = Holder()
COUNTED_ELSEWHERE = Holder(replicas=0)


@dataclass(frozen=True)
class PartialGradient:
    """A gradient that is the sum of its local tensors over some mesh dimensions."""

    index: int  # the position in `parameters`
    local: Tensor
    holder: Holder  # of the sum
    reductions: tuple[tuple[int, str], ...]  # pending: (mesh dimension, "sum" or "avg")
    counted: bool  # False: another rank counts it; this one only takes part in its sum


@dataclass(frozen=True)
class Shards:
    """Which ranks hold which gradients of a list, by position in the list."""

    tensors: Sequence[Tensor]  # the list itself
    kinds: list[int]  # of the local values: the index into `holders`; without gradient as well
    holders: list[Holder]
    partial: list[PartialGradient]
    without_gradient: list[Tensor]  # DTensor parameters

    def is_measured(self, index: int) -> bool:
        """Whether the local values of an entry count as they are."""
        return self.holders[self.kinds[index]] is not COUNTED_ELSEWHERE

    def holders_by_position(self) -> list[Holder]:
        """The holder of each entry's values, [len(tensors)]; of a pending sum, that of the sum."""
        holders = [self.holders[kind] for kind in self.kinds]
        for gradient in self.partial:
            if gradient.counted:
                holders[gradient.index] = gradient.holder
        return holders


def dtensor_type() -> Any:
    """``torch.distributed.tensor.DTensor``; None where the program has not imported its module."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def are_of_one_mesh(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's operations take the list: no DTensors, or DTensors of one mesh alone."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    meshes = {id(tensor.device_mesh) for tensor in sharded}  # type: ignore[attr-defined]
    return not sharded or (len(sharded) == len(tensors) and len(meshes) == 1)


def localize(
    tensors: Sequence[Any], from_parameters: bool
) -> tuple[list[Tensor | None], Kinds | None]:
    """The local tensor of each gradient, and the kinds of DTensors where there are any.

    For lists that the native module does not gather; its ``gather`` does the same.
    """
    dtensor = dtensor_type()
    local: list[Tensor | None] = []
    kind_of: list[int] = []
    examples: list[tuple[int, Any]] = []
    missing: list[int] = []
    known: dict[Any, int] = {}
    for index, tensor in enumerate(tensors):
        grad = tensor.grad if from_parameters else tensor
        described = tensor if grad is None else grad
        kind = -1
        if dtensor is not None and isinstance(described, dtensor):
            key = (id(described.device_mesh), described.placements)
            if key not in known:
                examples.append((index, described))
            kind = known.setdefault(key, len(known))
            if grad is None:
                missing.append(index)
            else:
                grad = described._local_tensor
        kind_of.append(kind)
        local.append(grad)
    return local, (kind_of, examples, missing) if examples else None


def describe(
    tensors: Sequence[Any],
    kinds: Kinds | None,
    from_parameters: bool,
    deduplicate: bool,
    uncounted: AbstractSet[int] = frozenset(),
    meshes: Sequence[Any] | None = None,
) -> Shards:
    """The ``Shards`` of a list, from its kinds of DTensors.

    Args:
        uncounted: positions of gradients that another rank counts.
        meshes: of each entry, the mesh over which a plain gradient is sharded, or None.

    Raises:
        ValueError: a DTensor whose placements do not say how its norm adds up.
    """
    kind_of, examples, missing = kinds or ([-1] * len(tensors), [], [])
    meanings = [_holder(index, example) for index, example in examples]
    pending = any(reductions for _, reductions in meanings)
    # A rank is a member of a mesh whether it has gradients that count or not.
    holders = dict.fromkeys(holder for holder, _ in meanings)
    if -1 in kind_of:
        holders[LOCAL] = None
    holders |= {Holder(mesh): None for mesh in meshes or () if mesh is not None}
    if pending or uncounted:
        holders[COUNTED_ELSEWHERE] = None
    place = {holder: kind for kind, holder in enumerate(holders)}
    by_kind = [place[holder] for holder, _ in meanings] + [place.get(LOCAL, 0)]
    partial = []
    # A plain tensor's -1 is the last one. Most lists are of one kind.
    same = len(meanings) == len(place) == 1 and meshes is None
    kinds_of_values = kind_of if same else [by_kind[kind] for kind in kind_of]
    for index, mesh in enumerate(meshes or ()):
        if mesh is not None:
            kinds_of_values[index] = place[Holder(mesh)]
    for index in uncounted:
        kinds_of_values[index] = place[COUNTED_ELSEWHERE]
    if pending:
        absent = set(missing)
        seen: set[int] = set()
        for index, kind in enumerate(kind_of):
            if kind >= 0 and meanings[kind][1] and index not in absent:
                grad = tensors[index].grad if from_parameters else tensors[index]
                # The summands are scaled like any gradient; what counts is their sum.
                kinds_of_values[index] = place[COUNTED_ELSEWHERE]
                if not (deduplicate and id(grad) in seen):
                    local = waited_for(grad._local_tensor)
                    counted = index not in uncounted
                    partial.append(PartialGradient(index, local, *meanings[kind], counted))
                seen.add(id(grad))
    without = [tensors[i] for i in missing]
    return Shards(tensors, kinds_of_values, list(holders), partial, without)


def as_dtensor(norm: Tensor, shards: Shards) -> Tensor:
    """A norm that every rank knows, as torch gives it: a replicated DTensor; no communication.

    Gradients of several meshes have no mesh in common: their norm stays a plain tensor.
    """
    meshes = {id(holder.mesh): holder.mesh for holder in shards.holders if holder.replicas}
    (mesh,) = meshes.values() if len(meshes) == 1 else (None,)
    if mesh is None:
        return norm
    from torch.distributed.tensor import DTensor, Replicate

    spec = _specs.get((mesh, norm.dtype))
    if spec is None:
        made = DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)
        spec = _specs[mesh, norm.dtype] = made._spec
        return made
    # As from_local does, without a node of autograd: a tenth of the time.
    return DTensor(norm, spec, requires_grad=False)  # type: ignore[no-untyped-call]


# Of 0-dim norms, by mesh and dtype. torch and ``topology`` remember meshes as well.
_specs: dict[tuple[Any, Any], Any] = {}


def waited_for(local: Any) -> Tensor:
    """The tensor behind the result of an asynchronous collective; any other as it is."""
    wait = None if type(local) is Tensor else getattr(local, "wait", None)
    result: Tensor = local if wait is None else wait()
    return result


def _holder(index: int, tensor: Any) -> tuple[Holder, tuple[tuple[int, str], ...]]:
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return LOCAL, ()  # this rank is not of the mesh; its local tensor is empty
    replicated: list[int] = []
    reductions: list[tuple[int, str]] = []
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            replicated.append(mesh.size(dimension))
        elif placement.is_partial():
            operation = placement.reduce_op
            if type(placement).__name__ != "Partial" or operation not in _SUMS:
                raise ValueError(
                    f"grads[{index}]: expected Partial('sum') or Partial('avg'), got {placement}; "
                    "redistribute() it to Shard or Replicate first"
                )
            reductions.append((dimension, operation))
        elif not placement.is_shard() and type(placement).__name__ != "_StridedShard":
            raise ValueError(
                f"grads[{index}]: expected placements Shard, Replicate or Partial, got "
                f"{placement}; redistribute() it first"
            )
    return Holder(mesh, math.prod(replicated)), tuple(reductions)
