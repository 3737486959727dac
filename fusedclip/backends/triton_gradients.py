"""gather's part for the Triton backend: which gradients its kernels take, and where those are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedclip.triton_kernels import device_types
from fusedclip.triton_kernels.table import CODES, Overlap, Span, Spans, spans_of

_PLAIN_TYPES = (Tensor, nn.Parameter)
_ITEM_SIZES = {dtype: dtype.itemsize for dtype in CODES}


@dataclass(frozen=True, eq=False)
class TritonGradients:
    """The gradients of one call on one device, each once."""

    tensors: list[Tensor]
    indices: list[int]  # their positions in the call's input
    spans: Spans
    device: torch.device

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def has_float64(self) -> bool:
        return bool(self.spans.has_float64)

    @property
    def has_empty(self) -> bool:
        return bool(self.spans.has_empty)


def take(
    pairs: Sequence[tuple[int, Tensor]], deduplicate: bool
) -> tuple[list[TritonGradients], list[tuple[int, Tensor]]]:
    """Deal (position, gradient) pairs: what the kernels take, by device, and the rest.

    Raises:
        ValueError: with ``deduplicate``, gradients overlap in part.
    """
    types = device_types()
    by_device: dict[torch.device, list[tuple[int, Tensor, Span]]] = {}
    other_devices: set[torch.device] = set()
    rest = []
    for index, grad in pairs:
        device, span = grad.device, None
        # To ask a device for its type takes as long as all the rest: once for each.
        if device in by_device or (device not in other_devices and device.type in types):
            span = _span(grad)
        else:
            other_devices.add(device)
        if span is None:
            rest.append((index, grad))
        else:
            by_device.setdefault(device, []).append((index, grad, span))
    return [_gradients(on, found, deduplicate) for on, found in by_device.items()], rest


def _span(grad: Tensor) -> Span | None:
    """Where the elements are; ``None`` when the kernels cannot take them."""
    dtype = grad.dtype
    item_size = _ITEM_SIZES.get(dtype)
    if (
        item_size is None
        or type(grad) not in _PLAIN_TYPES
        or grad.layout is not torch.strided
        or grad.is_neg()
        or not (grad.is_contiguous() or _is_dense(grad))
    ):
        return None
    address, numel = grad.data_ptr(), grad.numel()
    # Address 0: no memory behind the elements, as in torch._efficientzerotensor.
    if numel and (address == 0 or address % item_size):
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
    indices, tensors, listed = zip(*found, strict=True)
    try:
        spans = spans_of(listed, deduplicate)
    except Overlap as overlap:
        raise ValueError(
            f"grads[{indices[overlap.i]}] and grads[{indices[overlap.j]}]: expected gradients that "
            f"do not overlap in memory, got two that share {overlap.shared_bytes} bytes; "
            "clone one of them"
        ) from None
    if len(spans.kept) < len(found):
        indices = tuple(indices[i] for i in spans.kept)
        tensors = tuple(tensors[i] for i in spans.kept)
    return TritonGradients(list(tensors), list(indices), spans, device)
