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

import torch
from torch import Tensor

_Reductions = tuple[tuple[int, str], ...]  # (mesh dimension, "sum" or "avg")
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
class PartialGradient:
    """A gradient that is the sum of its local tensors over some mesh dimensions."""

    index: int  # the position in `parameters`
    local: Tensor
    segment: int  # of the summed values
    mesh: Any
    reductions: _Reductions


@dataclass(frozen=True)
class Shards:
    """A list of gradients taken apart, by position in the list."""

    local: list[Tensor | None]  # the local tensor of each gradient
    segments: list[int]  # the index into `holders`; of parameters without gradient as well
    holders: list[Holder]  # [num_segments]
    partial: list[PartialGradient]
    shapes: dict[int, tuple[int, ...]]  # of the whole tensor, where it is a DTensor
    device: torch.device  # of a rank's result when it holds no gradient
    has_float64: bool

    def segment_holders(self) -> list[Holder]:
        """The holder of each entry's values, [len(local)]."""
        holders = [self.holders[segment] for segment in self.segments]
        for gradient in self.partial:
            holders[gradient.index] = self.holders[gradient.segment]
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
    dtensor = dtensor_type()
    known: dict[Any, tuple[Holder, _Reductions]] = {}
    holders: dict[Holder, int] = {}  # → segment
    local: list[Tensor | None] = []
    segments: list[int] = []
    partial: list[PartialGradient] = []
    shapes: dict[int, tuple[int, ...]] = {}
    devices: list[torch.device] = []
    has_float64 = False
    for index, tensor in enumerate(tensors):
        grad = tensor.grad if from_parameters else tensor
        described = tensor if grad is None else grad
        holder: Holder = LOCAL
        reductions: _Reductions = ()
        if dtensor is not None and isinstance(described, dtensor):
            key = (id(described.device_mesh), described.placements)
            if key not in known:
                known[key] = _holder(index, described)
                devices.append(described.device)
            holder, reductions = known[key]
            has_float64 |= described.dtype == torch.float64
            if grad is not None:
                shapes[index] = tuple(grad.shape)
                grad = _local(grad)
        # The rank is a member of the mesh whether this gradient counts or not.
        segment = holders.setdefault(holder, len(holders))
        if index in uncounted:
            segment = holders.setdefault(COUNTED_ELSEWHERE, len(holders))
        if reductions and grad is not None:
            partial.append(PartialGradient(index, grad, segment, holder.mesh, reductions))
            # The summands are scaled like any gradient; what counts is their sum.
            segment = holders.setdefault(COUNTED_ELSEWHERE, len(holders))
        local.append(grad)
        segments.append(segment)
    device = devices[0] if devices else torch.device("cpu")
    return Shards(local, segments, list(holders), partial, shapes, device, has_float64)


def _holder(index: int, tensor: Any) -> tuple[Holder, _Reductions]:
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
