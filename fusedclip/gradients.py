"""gather: parameters → gradients, validated, deduplicated and dealt to the backends.

The result is a list of parts: what the kernels take, one part a device, and the rest, likewise by
device, for the reference. What a part computes is on the part's device.
"""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from fusedclip.aliasing import Extent, Overlap, each_once
from fusedclip.ambient import check_writable, is_plain
from fusedclip.backends import cpu, native, triton
from fusedclip.backends.reference import COMPLEX_DTYPES, DTYPES, ReferenceGradients
from fusedclip.backends.select import Choice
from fusedclip.parameters import check_types
from fusedclip.sharded.placements import (
    Kinds,
    Shards,
    describe,
    dtensor_type,
    localize,
    waited_for,
)

if TYPE_CHECKING:
    from fusedclip._C import CpuGradients


class Backend(Protocol):
    """The functions of a backend; ``backends.reference`` and ``backends.cuda`` document them."""

    def measure(
        self, grads: Any, segments: Sequence[int] | None, *, infinity: bool, out: Tensor
    ) -> None: ...

    def scale_(
        self,
        grads: Any,
        segments: Sequence[int] | None,
        coefficient: Tensor,
        *,
        zero_fill: bool = False,
    ) -> None: ...

    def clip_(
        self,
        grads: Any,
        max_norms: float | Tensor,
        *,
        segments: Sequence[int] | None = None,
        infinity: bool,
        nonfinite: str,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        tensor_norms: Tensor | None = None,
    ) -> Tensor | None: ...

    def nonfinite_indices(self, grads: Any) -> list[int]: ...


class Part(Protocol):
    """The gradients of one device that one backend serves."""

    @property
    def backend(self) -> Any: ...  # the module; a ``Backend``
    @property
    def tensors(self) -> list[Tensor]: ...
    @property
    def indices(self) -> list[int]: ...  # their positions in `parameters`
    @property
    def device(self) -> torch.device: ...
    @property
    def has_float64(self) -> bool: ...
    @property
    def has_float16(self) -> bool: ...
    @property
    def has_empty(self) -> bool: ...
    def __len__(self) -> int: ...


class LeftToTorch(Exception):
    """A gradient is not what its memory holds; nothing was done: ``dispatched`` takes the list."""


@dataclass(eq=False, repr=False)
class Gradients:
    """All gradients of a call."""

    parts: list[Part]  # by their first gradient
    shards: Shards | None = None  # where there are DTensors: what the local tensors are part of

    @property
    def sole(self) -> Part | None:
        """The only part of a list without shards: one backend has everything."""
        return self.parts[0] if len(self.parts) == 1 and self.shards is None else None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, not even for the other ranks."""
        return not self.parts and self.shards is None

    @property
    def length(self) -> int:
        """Of the list, up to its last gradient."""
        if self.shards is not None:
            return len(self.shards.tensors)
        return 1 + max((part.indices[-1] for part in self.parts), default=-1)

    @property
    def any_empty_tensor(self) -> bool:
        """Whether a gradient has no elements; a shard without any is part of one that has."""
        return self.shards is None and any(part.has_empty for part in self.parts)

    @property
    def norm_dtype(self) -> torch.dtype:
        """fp64 when any gradient is fp64 (or complex128), else fp32."""
        # A rank without a gradient answers in the type of those that have one.
        wide = any(part.has_float64 for part in self.parts) or any(
            tensor.dtype == torch.float64 for tensor in self._without_gradient()
        )
        return torch.float64 if wide else torch.float32

    @property
    def any_float16(self) -> bool:
        return any(part.has_float16 for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where the result lives: with the first gradient."""
        if self.parts:
            return self.parts[0].device
        others = self._without_gradient()
        return others[0].device if others else torch.device("cpu")

    def tensors(self) -> list[tuple[int, Tensor]]:
        """(position, gradient) for all, in the order of ``parameters``."""
        pairs = [
            pair for part in self.parts for pair in zip(part.indices, part.tensors, strict=True)
        ]
        return sorted(pairs, key=lambda pair: pair[0])

    def shape(self, index: int, grad: Tensor) -> tuple[int, ...]:
        """Of the whole gradient, of which ``grad`` may be a shard."""
        return tuple((grad if self.shards is None else self.shards.tensors[index]).shape)

    def nonfinite_indices(self) -> set[int]:
        """The positions of the gradients that hold NaN or inf. Waits for the devices."""
        return {i for part in self.parts for i in part.backend.nonfinite_indices(part)}

    def _without_gradient(self) -> list[Tensor]:
        return [] if self.shards is None else self.shards.without_gradient


def gather(
    tensors: Sequence[Tensor],
    choice: Choice,
    *,
    from_parameters: bool = True,
    deduplicate: bool = True,
    reads_only: bool = False,
    strict: bool = True,
    norm_type: float = 2.0,
    uncounted: AbstractSet[int] = frozenset(),
    meshes: Sequence[Any] | None = None,
    must_take_all: bool = False,
) -> Gradients:
    """The gradients of ``tensors`` (or the tensors themselves), nothing modified yet.

    Args:
        choice: whose dense gradients go to the kernels.
        from_parameters: take ``.grad`` of each tensor and skip ``None``.
        deduplicate: keep a gradient that is listed twice once; refuse partial overlaps.
        reads_only: nothing will be written: all that are listed count, whatever they share.
        strict: refuse what no backend can serve with ``ValueError`` or ``TypeError`` here; else it
            is torch's own error, raised later by the operation that cannot be done.
        uncounted: positions of gradients that another rank counts; they are only scaled.
        meshes: of each entry, the DeviceMesh over whose ranks a plain gradient is sharded, or None.
        must_take_all: the caller has no other way, and the reference does what it can.

    Raises:
        LeftToTorch: a gradient is a subclass, or a view or stand-in without values of its own.
        TypeError: an entry is not a tensor.
        ValueError: gradients overlap in memory; with ``strict``, an unsupported gradient.
    """
    deduplicate = deduplicate and not reads_only
    parts, odd, kinds = _deal(tensors, choice, from_parameters, deduplicate)
    if odd:
        odd = [(index, waited_for(grad)) for index, grad in odd]
        if choice.take_triton:
            # Not above: what it imports takes milliseconds, and most have no use for it.
            from fusedclip.backends import triton_gradients

            taken, odd = triton_gradients.take(odd, deduplicate)
            parts += taken
        for index, grad in odd:
            if not isinstance(grad, Tensor):
                raise TypeError(f"grads[{index}]: expected a Tensor, got {type(grad).__name__}")
        taken_all = must_take_all or kinds is not None or all(_is_taken(grad) for _, grad in odd)
        if not taken_all and not strict:
            raise LeftToTorch
        for index, grad in odd:
            _check_gradient(index, grad, strict, norm_type, choice, reads_only)
        if not taken_all:
            raise LeftToTorch
        parts += _for_the_reference(odd, deduplicate)
    if len(parts) > 1:  # the result lives on the first gradient's device
        parts.sort(key=lambda part: part.indices[0])
    shards = None
    if kinds is not None or uncounted or meshes is not None:
        shards = describe(tensors, kinds, from_parameters, deduplicate, uncounted, meshes)
    return Gradients(parts, shards)


def dense_cpu(
    tensors: Sequence[Tensor], choice: Choice, from_parameters: bool = True
) -> "tuple[CpuGradients | None, Sequence[Tensor]]":
    """The dense CPU gradients, for work on single elements, where duplicates do no harm.

    Of DTensors the local shards are taken, except where a value is still to be summed over ranks.

    Returns:
        The gradients (None where there are none), and the parameters of all others.
    """
    if not choice.take_cpu:
        return None, tensors
    parts, odd, kinds = _deal(tensors, Choice(take_cpu=True), from_parameters, False)
    examples = () if kinds is None else kinds[1]
    if any(p.is_partial() for _, example in examples for p in example.placements):
        return None, tensors
    # Of take_cpu alone, the one part is the CPU's.
    own = cast("CpuGradients", parts[0]) if parts else None
    if own is not None:
        check_writable(tensors, from_parameters)
    return own, [tensors[index] for index, _ in odd]


def _deal(
    tensors: Sequence[Tensor], choice: Choice, from_parameters: bool, deduplicate: bool
) -> tuple[list[Part], list[tuple[int, Tensor]], Kinds | None]:
    """Each gradient to the native kernels that take it; the rest is odd and not looked at yet."""
    native_takes = choice.take_triton and not cpu.problem()
    triton_devices = triton.served_devices() if native_takes else 0
    if choice.take_cpu or choice.cuda_devices or triton_devices:
        try:
            return native.module.gather(
                tensors,
                from_parameters,
                deduplicate,
                choice.take_cpu,
                choice.cuda_devices,
                triton_devices,
                dtensor_type(),
            )
        except AttributeError:
            check_types(tensors)
            raise
    check_types(tensors)
    local, kinds = localize(tensors, from_parameters)
    return [], [(index, grad) for index, grad in enumerate(local) if grad is not None], kinds


def _for_the_reference(
    odd: Sequence[tuple[int, Tensor]], deduplicate: bool
) -> list[ReferenceGradients]:
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, grad in odd:
        by_device.setdefault(grad.device, []).append((index, grad))
    parts = []
    for device, pairs in by_device.items():
        kept = _without_duplicates(pairs) if deduplicate else pairs
        parts.append(ReferenceGradients([g for _, g in kept], [i for i, _ in kept], device))
    return parts


def _check_gradient(
    index: int, grad: Tensor, strict: bool, norm_type: float, choice: Choice, reads_only: bool
) -> None:
    if not reads_only and _overlaps_itself(grad):
        message = (
            f"grads[{index}]: more than one element of this gradient of shape {tuple(grad.shape)}, "
            f"strides {grad.stride()} refers to a single memory location; clone() it first"
        )
        raise ValueError(message) if strict else RuntimeError(message)
    if not strict:
        return
    refusal = choice.refusal(grad.device)
    if refusal and grad.device.type != "meta":
        raise ValueError(
            f"grads[{index}]: backend={choice.only!r} cannot serve a gradient on {grad.device}: "
            f"{refusal}; use backend='auto'"
        )
    what = f"grads[{index}] (shape {tuple(grad.shape)}, {grad.dtype})"
    if grad.device.type == "meta":
        raise ValueError(
            f"{what}: expected a gradient with data, got one on device meta; "
            "materialize the module (to_empty) before clipping"
        )
    if grad.layout == torch.sparse_coo and norm_type not in (1.0, 2.0, math.inf):
        raise ValueError(
            f"{what}: the norm of a sparse COO gradient is defined for norm_type 1, 2 and inf, "
            f"got {norm_type}; call .to_dense() on it first"
        )
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(
            f"{what}: expected a dense gradient, got {grad.layout}; "
            "convert it with .to_dense() or .to_sparse_coo()"
        )
    if grad.dtype not in DTYPES + COMPLEX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{what}: expected a gradient of dtype {names} or complex, got {grad.dtype}; convert "
            "it before clipping"
        )


def _is_taken(grad: Tensor) -> bool:
    """Whether the reference computes what torch would."""
    usual = grad.layout in (torch.strided, torch.sparse_coo)
    return usual and is_plain(grad) and grad.dtype in (*DTYPES, *COMPLEX_DTYPES)


def _overlaps_itself(grad: Tensor) -> bool:
    return grad.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )


def _without_duplicates(odd: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """Each gradient once; an error for dense gradients that share part of their memory."""
    try:
        return [odd[i] for i in each_once([_extent(grad) for _, grad in odd])]
    except Overlap as overlap:
        raise overlap.error([index for index, _ in odd]) from None


def _extent(grad: Tensor) -> Extent:
    plain = type(grad) in (Tensor, nn.Parameter) and grad.layout == torch.strided
    start = grad.data_ptr() if plain and grad.device.type != "meta" else 0
    if not start:
        return Extent(id(grad), 0, 0)
    key = (start, grad.shape, grad.stride(), grad.dtype, grad.device)
    return Extent(key, start, grad.nbytes if _has_no_holes(grad) else 0)


def _has_no_holes(grad: Tensor) -> bool:
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )
    return extent == grad.numel()
