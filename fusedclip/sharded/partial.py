"""Gradients that are pending sums (DTensor's ``Partial``): their norm is that of the sum.

torch rescales the summands, which rescales the sum, and leaves the gradient ``Partial``; so does
``scale``. Only the norm needs the sum, and of that each rank needs no more than a share: buckets of
summands go through a reduce-scatter, and every rank measures the share it gets.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.sharded.placements import PartialGradient, Shards
from fusedclip.sharded.reduce import collective
from fusedclip.sharded.topology import device_for, layout

BUCKET_ELEMENTS = 1 << 20  # 4 MiB in fp32: large for most networks, small beside a model


@dataclass(frozen=True)
class _Piece:
    """Some consecutive elements of a gradient and where they are in a bucket."""

    gradient: PartialGradient
    begin: int  # in the gradient
    end: int
    offset: int  # in the bucket


def measure_partial(shards: Shards, rows: Sequence[int], order: float, sums: Tensor) -> None:
    """Add ``reference.power_sum`` of this rank's shares of the summed gradients to ``sums``.

    Args:
        rows: the place in ``sums`` of each gradient of ``shards.partial``.
        order: p of the p-norm; for ±inf it is the maximum or minimum that is taken.
        sums: fp64, changed in place.
    """
    combine = {math.inf: torch.maximum, -math.inf: torch.minimum}.get(order, torch.add)
    row_of = {gradient.index: row for gradient, row in zip(shards.partial, rows, strict=True)}
    for mesh, reductions, members in _batches(shards):
        for bucket in _buckets(members):
            share, start = _reduce_scatter(bucket, mesh, reductions)
            for piece in bucket:
                begin = max(0, piece.offset - start)
                end = min(share.numel(), piece.offset + piece.end - piece.begin - start)
                if begin < end and piece.gradient.counted:
                    row = row_of[piece.gradient.index]
                    power = reference.power_sum(share[begin:end], order).to(sums.device)
                    sums[row] = combine(sums[row], power)


def _batches(
    shards: Shards,
) -> list[tuple[Any, tuple[tuple[int, str], ...], list[PartialGradient]]]:
    """(mesh, its reductions, gradients), in an order that all ranks agree on."""
    batches: dict[Any, tuple[Any, tuple[tuple[int, str], ...], list[PartialGradient]]] = {}
    for gradient in shards.partial:
        mesh, reductions = gradient.holder.mesh, gradient.reductions
        key = (layout(mesh).key, reductions, gradient.local.dtype == torch.float64)
        batches.setdefault(key, (mesh, reductions, []))[2].append(gradient)
    return [batch for _, batch in sorted(batches.items(), key=lambda item: item[0])]


def _buckets(gradients: Sequence[PartialGradient]) -> Iterator[list[_Piece]]:
    bucket: list[_Piece] = []
    used = 0
    for gradient in gradients:
        begin, numel = 0, gradient.local.numel()
        while begin < numel:
            end = min(numel, begin + BUCKET_ELEMENTS - used)
            bucket.append(_Piece(gradient, begin, end, used))
            used += end - begin
            begin = end
            if used == BUCKET_ELEMENTS:
                yield bucket
                bucket, used = [], 0
    if bucket:
        yield bucket


def _reduce_scatter(
    bucket: Sequence[_Piece], mesh: Any, reductions: Sequence[tuple[int, str]]
) -> tuple[Tensor, int]:
    """This rank's share of the summed bucket, fp32 (fp64 for fp64), and where it starts."""
    first = bucket[0].gradient.local
    groups = [mesh.get_group(dimension) for dimension, _ in reductions]
    ranks = 1
    for group in groups:
        ranks *= group.size()
    used = bucket[-1].offset + bucket[-1].end - bucket[-1].begin
    share = torch.zeros(
        -(-used // ranks) * ranks,
        dtype=torch.float64 if first.dtype == torch.float64 else torch.float32,
        device=device_for(groups[0], first.device),
    )
    for piece in bucket:
        values = piece.gradient.local.detach().reshape(-1)[piece.begin : piece.end]
        share[piece.offset : piece.offset + values.numel()].copy_(values)
    start = 0
    for group, (_, operation) in zip(groups, reductions, strict=True):
        whole, share = share, share.new_empty(share.numel() // group.size())
        collective(dist.reduce_scatter_tensor, share, whole, group=group)
        if operation == "avg":
            share /= group.size()
        start += group.rank() * share.numel()
    return share, start
