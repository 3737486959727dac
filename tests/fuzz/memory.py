"""Gradients in one piece of memory of which every byte is known.

The memory is divided into slots that gradients take, leave and take again with another type, so
that addresses are reused all the time. A second copy, the twin, says what each byte must be: a
write beside a gradient, or through an address that was a gradient's once, shows.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64
_FILLING = 0xA5


@dataclass(eq=False)
class Held:
    """A gradient that some parameters hold, and what its values must be."""

    grad: Tensor
    twin: Tensor
    slot: int | None = None  # None: not in the arena
    seen_by_view: bool = False  # a second tensor has the same memory

    @property
    def plain(self) -> bool:
        """Dense and real."""
        return self.grad.layout == torch.strided and not self.grad.is_complex()

    @property
    def movable(self) -> bool:
        return self.plain and self.slot is not None and not self.seen_by_view

    def accept(self) -> None:
        """The values that it has are the right ones from now on."""
        if self.grad.layout == torch.sparse_coo:
            self.twin = self.grad.detach().clone()
        else:
            self.twin.copy_(self.grad)


class Arena:
    """The memory, its twin, and which slots are free."""

    def __init__(self, slots: Sequence[int], crowd_bytes: int) -> None:
        sizes = [*slots, crowd_bytes]
        self._starts = [0, *itertools.accumulate(-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes)]
        self._sizes = sizes
        self._bytes = torch.full((self._starts[-1],), _FILLING, dtype=torch.uint8)
        self._twin = self._bytes.clone()
        self._free = list(range(len(slots)))

    def slot_for(self, nbytes: int) -> int | None:
        """The free slot that was left last, of those that are large enough."""
        for slot in reversed(self._free):
            if self._sizes[slot] >= nbytes:
                self._free.remove(slot)
                return slot
        return None

    def leave(self, held: Held) -> None:
        if held.slot is not None:
            self._free.append(held.slot)

    def hold(self, slot: int, values: Tensor, layout: str, shift: int) -> Held:
        """``values`` in a slot, ``shift`` elements behind its start."""
        start = self._starts[slot] // values.element_size() + shift
        size, stride = values.shape, strides(values.shape, layout)
        grad, twin = (
            memory.view(values.dtype).as_strided(size, stride, start)
            for memory in (self._bytes, self._twin)
        )
        grad.copy_(values)
        twin.copy_(values)
        return Held(grad, twin, slot)

    def crowd(self, values: Sequence[Tensor]) -> list[Held]:
        """Many small gradients side by side in the last slot."""
        held = []
        start = self._starts[-2]
        for value in values:
            position = start // value.element_size()
            grad, twin = (
                memory.view(value.dtype)[position : position + value.numel()]
                for memory in (self._bytes, self._twin)
            )
            grad.copy_(value)
            twin.copy_(value)
            held.append(Held(grad, twin))
            start += -(-value.nbytes // 8) * 8
        assert start <= self._starts[-1]
        return held

    def check(self) -> None:
        if not torch.equal(self._bytes.view(torch.int64), self._twin.view(torch.int64)):
            wrong = (self._bytes != self._twin).nonzero().flatten()
            slot = sum(int(wrong[0]) >= start for start in self._starts) - 1
            raise AssertionError(
                f"{len(wrong)} bytes changed that no call was to change, the first at "
                f"{int(wrong[0]) - self._starts[slot]} of slot {slot}"
            )


def strides(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """contiguous; permuted: dense with the dimensions in reverse; holes: every other element."""
    order = range(len(shape)) if layout == "permuted" else reversed(range(len(shape)))
    step = 2 if layout == "holes" else 1
    result = [0] * len(shape)
    for dimension in order:
        result[dimension] = step
        step *= max(1, shape[dimension])
    return tuple(result)


def bytes_needed(shape: Sequence[int], dtype: torch.dtype, layout: str, shift: int) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return (elements * (2 if layout == "holes" else 1) + shift) * dtype.itemsize
