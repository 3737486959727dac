"""What DTensors say: the local values of each gradient, and which ranks hold the same or others.

``localize`` takes a list with DTensors apart. What it gives are plain tensors, which the backends
measure and scale like any other, and one ``Holder`` for each kind of gradient, from which
``distributed`` knows how their sums add up. Nothing is copied and nothing is communicated.
"""

import math
import sys
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_SUMS = ("sum", "avg")  # the pending reductions that rescaling each summand rescales


@dataclass(frozen=True)
class Holder:
    """Who holds gradients of one kind: the ranks of ``mesh``, each value on ``replicas`` of them.

    A sum over all ranks of the mesh counts every value once when each rank divides by
    ``replicas``; so a replica that went astray is seen by every rank.
    """

    mesh: Any = None  # a DeviceMesh; None: this process alone
    replicas: int = 1  # 0: counted on another rank, so not here


LOCAL = Holder()
COUNTED_ELSEWHERE = Holder(replicas=0)


@dataclass(frozen=True)
class Kind:
    """What the gradients of one mesh and one list of placements have in common."""

    holder: Holder
    segment: int
    reductions: tuple[tuple[int, str], ...]  # pending: (mesh dimension, "sum" or "avg")


@dataclass(frozen=True)
class PartialGradient:
    """A gradient that is the sum of its local tensors over some mesh dimensions."""

    index: int  # the position in `parameters`
    local: Tensor
    kind: Kind


@dataclass(frozen=True)
class Shards:
    """A list of gradients taken apart, by position in the list."""

    tensors: Sequence[Tensor]  # the list itself
    local: list[Tensor | None]  # the local tensor of each gradient
    segments: list[int]  # the index into `holders`; of parameters without gradient as well
    holders: list[Holder]  # [num_segments]
    partial: list[PartialGradient]
    without_gradient: list[Tensor]  # DTensor parameters

    def segment_holders(self) -> list[Holder]:
        """The holder of each entry's values, [len(local)]."""
        holders = [self.holders[segment] for segment in self.segments]
        for gradient in self.partial:
            holders[gradient.index] = gradient.kind.holder
        return holders


def dtensor_type() -> Any:
    """``torch.distributed.tensor.DTensor``, or None where nobody has imported it: no import."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def localize(
    tensors: Sequence[Tensor], from_parameters: bool, uncounted: AbstractSet[int] = frozenset()
) -> Shards:
    """Take DTensors among ``tensors`` (or their ``.grad``) apart.

    A DTensor parameter makes this rank a member of its mesh even without a gradient.

    Args:
        uncounted: positions of gradients that another rank counts.

    Raises:
        ValueError: a DTensor whose placements do not say how its norm adds up.
    """
    dtensor = dtensor_type() or ()
    holders: dict[Holder, int] = {}  # → segment
    kinds = _Kinds(holders)
    local: list[Tensor | None] = []
    segments: list[int] = []
    partial: list[PartialGradient] = []
    without_gradient: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        grad = tensor.grad if from_parameters else tensor
        described = tensor if grad is None else grad
        if not isinstance(described, dtensor):
            segment = holders.setdefault(LOCAL, len(holders))
        else:
            # The rank is a member of the mesh whether it has a gradient that counts or not.
            kind = kinds.of(index, described)
            segment = kind.segment
            if grad is None:
                without_gradient.append(described)
            else:
                grad = _local(grad)
                if kind.reductions:
                    # The summands are scaled like any gradient; what counts is their sum.
                    partial.append(PartialGradient(index, grad, kind))
                    segment = holders.setdefault(COUNTED_ELSEWHERE, len(holders))
        local.append(grad)
        segments.append(segment)
    for index in uncounted:
        segments[index] = holders.setdefault(COUNTED_ELSEWHERE, len(holders))
    return Shards(tensors, local, segments, list(holders), partial, without_gradient)


class _Kinds:
    """Remembers what placements mean; most lists have one or two kinds of DTensors."""

    def __init__(self, holders: dict[Holder, int]) -> None:
        self._holders = holders
        self._known: dict[Any, Kind] = {}
        self._mesh: Any = None
        self._placements: Any = None
        self._kind = Kind(LOCAL, 0, ())

    def of(self, index: int, tensor: Any) -> "Kind":
        mesh, placements = tensor.device_mesh, tensor.placements
        # Hashing placements is slow; neighbours are mostly alike.
        if mesh is not self._mesh or placements != self._placements:
            key = (id(mesh), placements)
            if key not in self._known:
                holder, reductions = _holder(index, tensor)
                segment = self._holders.setdefault(holder, len(self._holders))
                self._known[key] = Kind(holder, segment, reductions)
            self._mesh, self._placements, self._kind = mesh, placements, self._known[key]
        return self._kind


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


def _local(grad: Any) -> Tensor:
    """The local tensor itself, as ``to_local()`` gives it but without autograd."""
    local: Tensor = grad._local_tensor
    if type(local) is Tensor:
        return local
    wait = getattr(local, "wait", None)  # a collective that has not been waited for
    return local if wait is None else wait()
