"""gather's part for the Triton backend: which gradients its kernels take, and where those are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedclip.triton_kernels import interpreted
from fusedclip.triton_kernels.table import CODES, Overlap, Span, Spans, spans_of

_PLAIN_TYPES = (Tensor, nn.Parameter)


@dataclass(frozen=True)
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


def device_types() -> tuple[str, ...]:
    """Where the kernels can run; ROCm's devices are called cuda as well."""
    return ("cpu",) if interpreted() else ("cuda", "xpu")


def take(
    pairs: Sequence[tuple[int, Tensor]], deduplicate: bool
) -> tuple[list[TritonGradients], list[tuple[int, Tensor]]]:
    """Deal (position, gradient) pairs: what the kernels take, by device, and the rest.

    Raises:
        ValueError: with ``deduplicate``, gradients overlap in part.
    """
    by_device: dict[torch.device, list[tuple[int, Tensor, Span]]] = {}
    rest = []
    types = device_types()
    for index, grad in pairs:
        span = _span(grad, types)
        if span is None:
            rest.append((index, grad))
        else:
            by_device.setdefault(grad.device, []).append((index, grad, span))
    return [_gradients(on, found, deduplicate) for on, found in by_device.items()], rest


def _span(grad: Tensor, types: tuple[str, ...]) -> Span | None:
    """Where the elements are; ``None`` when the kernels cannot take them."""
    suitable = (
        type(grad) in _PLAIN_TYPES
        and grad.device.type in types
        and grad.dtype in CODES
        and grad.layout == torch.strided
        and not grad.is_neg()
        and (grad.is_contiguous() or _is_dense(grad))
    )
    if not suitable:
        return None
    address, numel = grad.data_ptr(), grad.numel()
    # Address 0: no memory behind the elements, as in torch._efficientzerotensor.
    if numel and (address == 0 or address % grad.itemsize):
        return None
    return address, numel, grad.dtype


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
