"""gather for the Triton backend: which gradients its kernels take, and where they are in memory.

Where the native module is there it deals them; this is for machines without a compiler.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusedclip.aliasing import Extent, Overlap, each_once
from fusedclip.backends import triton
from fusedclip.triton_kernels import device_types
from fusedclip.triton_kernels.table import CODES, pack

_PLAIN_TYPES = (Tensor, nn.Parameter)
_index = operator.itemgetter(0)

Span = tuple[int, int, torch.dtype]  # address, number of elements


@dataclass(frozen=True, eq=False)
class TritonGradients:
    """The gradients of one call on one device, each once; ``_C.TritonGradients`` is the same."""

    backend: ClassVar[ModuleType] = triton
    tensors: list[Tensor]
    indices: list[int]  # their positions in the call's input
    spans: bytes  # as ``table.lay_out`` takes them
    device: torch.device

    total_bytes: int
    has_float64: bool
    has_float16: bool
    has_empty: bool

    def __len__(self) -> int:
        return len(self.tensors)


def take(
    pairs: Sequence[tuple[int, Tensor]], deduplicate: bool
) -> tuple[list[TritonGradients], list[tuple[int, Tensor]]]:
    """Deal (position, gradient) pairs: what the kernels take, by device, and the rest.

    Raises:
        ValueError: with ``deduplicate``, gradients overlap in part.
    """
    # By number: to ask a device for its type, or to hash it, takes as long as all the rest.
    by_device: dict[int, list[tuple[int, Tensor, Span]]] = {}
    devices: dict[int, torch.device] = {}
    rest = []
    for pair in pairs:
        index, grad = pair
        number = grad.get_device()  # -1 on the CPU
        found = by_device.get(number)
        if found is None:
            found = by_device[number] = []
            devices[number] = grad.device
        span = _span(grad)
        if span is None:
            rest.append(pair)
        else:
            found.append((index, grad, span))
    types, taken = device_types(), []
    for number, found in by_device.items():
        if devices[number].type not in types:
            rest += [(index, grad) for index, grad, _ in found]
        elif found:
            taken.append(_gradients(devices[number], found, deduplicate))
    rest.sort(key=_index)
    return taken, rest


def _span(grad: Tensor) -> Span | None:
    """Where the elements are; ``None`` when the kernels cannot take them."""
    if type(grad) not in _PLAIN_TYPES or grad.dtype not in CODES:
        return None
    try:
        if grad.is_neg() or not (grad.is_contiguous() or _is_dense(grad)):
            return None
        address, numel, dtype = grad.data_ptr(), grad.numel(), grad.dtype
    except RuntimeError:  # no strides or no memory: sparse, functorch's wrappers
        return None
    # Address 0: no memory behind the elements, as in torch._efficientzerotensor.
    if numel and (address == 0 or (address % 8 and address % dtype.itemsize)):
        return None
    return address, numel, dtype


def _is_dense(grad: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(grad.stride(), grad.shape, strict=True)):
        if size != 1 and stride != expected:
            return grad.numel() == 0
        expected *= size
    return True


def _gradients(
    device: torch.device, found: list[tuple[int, Tensor, Span]], deduplicate: bool
) -> TritonGradients:
    indices, tensors, spans = zip(*found, strict=True)
    try:
        listed = _listed(spans, deduplicate)
    except Overlap as overlap:
        raise overlap.error(indices) from None
    return TritonGradients(
        [tensors[i] for i in listed.kept], [indices[i] for i in listed.kept], listed.spans, device,
        listed.total_bytes, listed.has_float64, listed.has_float16, listed.has_empty,
    )  # fmt: skip


@dataclass(frozen=True)
class _Listed:
    kept: list[int]
    spans: bytes
    total_bytes: int
    has_float64: bool
    has_float16: bool
    has_empty: bool


@functools.lru_cache(maxsize=16)
def _listed(spans: tuple[Span, ...], deduplicate: bool) -> _Listed:
    """What a list is, which is found again for the same list at the next step.

    Raises:
        Overlap: with ``deduplicate``, gradients share memory in part.
    """
    kept = list(range(len(spans)))
    if deduplicate:
        # All empty gradients are kept: each has a norm of its own.
        extents = [
            Extent(span if span[1] else i, span[0], span[1] * span[2].itemsize)
            for i, span in enumerate(spans)
        ]
        kept = each_once(extents)
    chosen = [spans[i] for i in kept]
    dtypes = {dtype for _, _, dtype in chosen}
    return _Listed(
        kept,
        pack(chosen),
        sum(numel * dtype.itemsize for _, numel, dtype in chosen),
        torch.float64 in dtypes,
        torch.float16 in dtypes,
        any(numel == 0 for _, numel, _ in chosen),
    )
