"""Which gradients share memory, for lists that Python deals (``csrc/aliasing.h`` for the others).

A gradient that is listed twice counts and scales once. Gradients that overlap in part are an error,
since no factor would be right for the elements that they share.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Extent(NamedTuple):
    """The memory of a gradient without holes; ``size`` 0 where nothing is known to be shared."""

    key: Hashable  # equal for gradients that are the same one
    begin: int  # first byte
    size: int  # in bytes


class Overlap(Exception):
    """Two gradients share part of their memory: their positions in the list, and the bytes."""

    def __init__(self, i: int, j: int, shared_bytes: int) -> None:
        super().__init__(i, j, shared_bytes)
        self.i, self.j, self.shared_bytes = i, j, shared_bytes

    def error(self, indices: Sequence[int]) -> ValueError:
        """What the user is told; ``indices`` are the positions in the call's input."""
        return ValueError(
            f"grads[{indices[self.i]}] and grads[{indices[self.j]}]: expected gradients that do "
            f"not overlap in memory, got two that share {self.shared_bytes} bytes; clone one of "
            "them"
        )


def each_once(extents: Sequence[Extent]) -> list[int]:
    """The positions of the first gradient of each key, ascending.

    Raises:
        Overlap: two of them share memory.
    """
    first: dict[Hashable, int] = {}
    for i, extent in enumerate(extents):
        first.setdefault(extent.key, i)
    kept = list(first.values())
    in_memory = sorted((extents[i].begin, i) for i in kept if extents[i].size)
    for (begin, i), (next_begin, j) in itertools.pairwise(in_memory):
        shared = begin + extents[i].size - next_begin
        if shared > 0:
            raise Overlap(min(i, j), max(i, j), min(shared, extents[j].size))
    return kept
