"""gather: parameters → gradients, validated, deduplicated and dealt to the backends.

The result is a list of ``Part``: what the kernels take, one part a device, and the rest, likewise
by device, for the reference. What a part computes is on the part's device.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fusedclip.backends import cpu, cuda, native, reference, triton
from fusedclip.backends.select import Choice
from fusedclip.sharding import Kinds, Shards, describe, dtensor_type, localize, waited_for

if TYPE_CHECKING:
    from fusedclip.backends.triton_gradients import TritonGradients

Parameters = Tensor | Iterable[Tensor] | nn.Module | torch.optim.Optimizer

_NATIVE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)


class Backend(Protocol):
    """What the split path asks of a backend; ``backends.reference`` documents the functions."""

    def measure(
        self,
        grads: Any,
        segments: Sequence[int] | None,
        *,
        infinity: bool,
        inv_scale: float = 1.0,
        out: Tensor,
    ) -> None: ...

    def scale_(
        self,
        grads: Any,
        segments: Sequence[int] | None,
        coefficient: Tensor,
        *,
        zero_fill: bool = False,
    ) -> None: ...


@dataclass(frozen=True)
class Part:
    """The gradients of one device that one backend serves."""

    backend: Backend
    grads: Any  # what the backend takes: a list of tensors, _C.CpuGradients, TritonGradients, …
    indices: list[int]  # their positions in `parameters`
    device: torch.device


@dataclass(eq=False)  # a frozen one is 0.3 µs slower to make, and each call makes one
class Gradients:
    """All gradients of a call."""

    cpu: Any  # _C.CpuGradients or None
    cuda: list[Any]  # [_C.CudaGradients], one a device
    odd: list[tuple[int, Tensor]]  # [(position in `parameters`, gradient)]
    triton: Sequence["TritonGradients"] = ()  # one a device
    shards: Shards | None = None  # where there are DTensors: what the local tensors are part of

    @property
    def only_cpu(self) -> bool:
        """Whether all gradients are in ``cpu``, and whole."""
        return (
            self.cpu is not None
            and not (self.cuda or self.triton or self.odd)
            and self.shards is None
        )

    @property
    def only_one_gpu(self) -> bool:
        """Whether all gradients are in ``cuda[0]`` or ``triton[0]``, and whole."""
        one = len(self.cuda) + len(self.triton) == 1
        return one and self.cpu is None and not self.odd and self.shards is None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, not even for the other ranks."""
        return (
            self.cpu is None and not (self.cuda or self.triton or self.odd) and self.shards is None
        )

    @property
    def any_empty_tensor(self) -> bool:
        """Whether a gradient has no elements; a shard without any is part of one that has."""
        if self.shards is not None:
            return False
        return any(grads.has_empty for grads in self._native()) or any(
            grad.numel() == 0 for _, grad in self.odd
        )

    @property
    def norm_dtype(self) -> torch.dtype:
        """fp64 when any gradient is fp64 (or complex128), else fp32."""
        wide = any(grads.has_float64 for grads in self._native()) or any(
            grad.dtype in (torch.float64, torch.complex128) for _, grad in self.odd
        )
        # A rank without a gradient answers in the type of those that have one.
        wide = wide or any(tensor.dtype == torch.float64 for tensor in self._without_gradient())
        return torch.float64 if wide else torch.float32

    @property
    def any_float16(self) -> bool:
        return any(grads.has_float16 for grads in self._native()) or any(
            grad.dtype == torch.float16 for _, grad in self.odd
        )

    @property
    def device(self) -> torch.device:
        """Where the result lives: with the first gradient."""
        if self.only_cpu:
            return torch.device("cpu")
        parts = self.parts
        if parts:
            return parts[0].device
        others = self._without_gradient()
        return others[0].device if others else torch.device("cpu")

    @functools.cached_property
    def parts(self) -> list[Part]:
        parts = [Part(cuda, grads, grads.indices, cuda.device(grads)) for grads in self.cuda]
        parts += [Part(triton, grads, grads.indices, grads.device) for grads in self.triton]
        if self.cpu is not None:
            parts.append(Part(cpu, self.cpu, self.cpu.indices, cpu.device(self.cpu)))
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for index, grad in self.odd:
            by_device.setdefault(grad.device, []).append((index, grad))
        for device, members in by_device.items():
            indices = [index for index, _ in members]
            parts.append(Part(reference, [grad for _, grad in members], indices, device))
        # The result lives on the first gradient's device.
        return sorted(parts, key=lambda part: part.indices[0])

    def tensors(self) -> list[tuple[int, Tensor]]:
        """(position, gradient) for all, in the order of ``parameters``."""
        dense = [
            pair
            for grads in self._native()
            for pair in zip(grads.indices, grads.tensors, strict=True)
        ]
        return sorted(dense + self.odd, key=lambda pair: pair[0])

    def shape(self, index: int, grad: Tensor) -> tuple[int, ...]:
        """Of the whole gradient, of which ``grad`` may be a shard."""
        return tuple((grad if self.shards is None else self.shards.tensors[index]).shape)

    def nonfinite_indices(self) -> set[int]:
        """The positions of the gradients that hold NaN or inf. Waits for the devices."""
        bad = {self.odd[k][0] for k in reference.nonfinite_positions([g for _, g in self.odd])}
        for grads in self.cuda:
            bad.update(cuda.nonfinite_indices(grads))
        for grads in self.triton:
            bad.update(triton.nonfinite_indices(grads))
        return bad if self.cpu is None else bad.union(cpu.nonfinite_indices(self.cpu))

    def _without_gradient(self) -> list[Tensor]:
        return [] if self.shards is None else self.shards.without_gradient

    def _native(self) -> list[Any]:
        return [*([] if self.cpu is None else [self.cpu]), *self.cuda, *self.triton]


def parameter_list(parameters: Parameters) -> Sequence[Tensor]:
    """``parameters`` as a list or tuple: a tensor, an iterable, a module or an optimizer."""
    if isinstance(parameters, (list, tuple)):
        return parameters
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    if isinstance(parameters, torch.optim.Optimizer):
        return [p for group in parameters.param_groups for p in group["params"]]
    if isinstance(parameters, Iterable):
        return list(parameters)
    raise TypeError(
        "parameters: expected a Tensor, an iterable of Tensors, an nn.Module or an Optimizer, "
        f"got {type(parameters).__name__}"
    )


def parameter_names(parameters: Parameters) -> list[str] | None:
    """The names of all in the order of ``parameter_list``, where the container knows them."""
    if isinstance(parameters, nn.Module):
        return [name for name, _ in parameters.named_parameters()]
    if isinstance(parameters, torch.optim.Optimizer):
        groups = parameters.param_groups
        if all("param_names" in group for group in groups):
            return [name for group in groups for name in group["param_names"]]
    return None


def gather(
    tensors: Sequence[Tensor],
    choice: Choice,
    *,
    from_parameters: bool = True,
    deduplicate: bool = True,
    strict: bool = True,
    norm_type: float = 2.0,
    uncounted: AbstractSet[int] = frozenset(),
) -> Gradients:
    """The gradients of ``tensors`` (or the tensors themselves), nothing modified yet.

    Args:
        choice: whose dense gradients go to the kernels.
        from_parameters: take ``.grad`` of each tensor and skip ``None``.
        deduplicate: keep a gradient that is listed twice once; refuse partial overlaps.
        strict: refuse what no backend can serve with ``ValueError`` or ``TypeError`` here; else it
            is torch's own error, raised later by the operation that cannot be done.
        uncounted: positions of gradients that another rank counts; they are only scaled.

    Raises:
        TypeError: an entry is not a tensor.
        ValueError: gradients overlap in memory; with ``strict``, an unsupported gradient.
    """
    on_cpu, on_cuda, odd, kinds = _deal(tensors, choice, from_parameters, deduplicate)
    sharded = kinds is not None or len(uncounted) > 0
    if not odd and not sharded:
        return Gradients(on_cpu, on_cuda, odd)
    odd = [(index, waited_for(grad)) for index, grad in odd]
    on_triton: Sequence[TritonGradients] = ()
    if choice.take_triton:
        # Not above: what it imports takes milliseconds, and most have no use for it.
        from fusedclip.backends import triton_gradients

        on_triton, odd = triton_gradients.take(odd, deduplicate)
    for index, grad in odd:
        _check_gradient(index, grad, strict, norm_type, choice)
    if deduplicate:
        odd = _without_duplicates(odd)
    shards = describe(tensors, kinds, from_parameters, deduplicate, uncounted) if sharded else None
    return Gradients(on_cpu, on_cuda, odd, on_triton, shards)


def split_dense_cpu(tensors: Sequence[Tensor], choice: Choice) -> tuple[Any, Sequence[Tensor]]:
    """What element-wise work needs: nobody else's values, and duplicates do no harm.

    Of DTensors the local shards are taken, except where a value is still to be summed over ranks.

    Returns:
        The dense CPU gradients as ``_C.CpuGradients``, or None where there are none, and the
        parameters whose gradients they do not include.
    """
    if not choice.take_cpu:
        return None, tensors
    on_cpu, _, odd, kinds = _deal(tensors, Choice(take_cpu=True), True, False)
    examples = () if kinds is None else kinds[1]
    if any(p.is_partial() for _, example in examples for p in example.placements):
        return None, tensors
    return on_cpu, [tensors[index] for index, _ in odd]


def _deal(
    tensors: Sequence[Tensor], choice: Choice, from_parameters: bool, deduplicate: bool
) -> tuple[Any, list[Any], list[tuple[int, Tensor]], Kinds | None]:
    """Each gradient to the native kernels that take it; the rest is odd and not looked at yet."""
    if choice.take_cpu or choice.cuda_devices:
        try:
            dealt: tuple[Any, list[Any], list[tuple[int, Tensor]], Kinds | None] = (
                native.module.gather(
                    tensors,
                    from_parameters,
                    deduplicate,
                    choice.take_cpu,
                    choice.cuda_devices,
                    dtensor_type(),
                )
            )
        except AttributeError:
            check_types(tensors)
            raise
        return dealt
    check_types(tensors)
    local, kinds = localize(tensors, from_parameters)
    odd = [(index, grad) for index, grad in enumerate(local) if grad is not None]
    return None, [], odd, kinds


def check_types(tensors: Sequence[Tensor]) -> None:
    """Raises TypeError, naming the entry, unless all are tensors."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            hint = (
                "; pass parameters(), not named_parameters()" if isinstance(tensor, tuple) else ""
            )
            raise TypeError(
                f"parameters[{i}]: expected a Tensor, got {type(tensor).__name__}{hint}"
            )


def _check_gradient(
    index: int, grad: Tensor, strict: bool, norm_type: float, choice: Choice
) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"grads[{index}]: expected a Tensor, got {type(grad).__name__}")
    if _overlaps_itself(grad):
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
    if grad.dtype not in _NATIVE_DTYPES + _COMPLEX_DTYPES:
        raise ValueError(
            f"{what}: expected a gradient of dtype float32, float64, float16, bfloat16 or complex, "
            f"got {grad.dtype}; convert it before clipping"
        )


def _overlaps_itself(grad: Tensor) -> bool:
    return grad.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )


def _without_duplicates(odd: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """Each gradient once; an error for dense gradients that share part of their memory."""
    seen: set[Any] = set()
    unique: list[tuple[int, Tensor]] = []
    ranges: list[tuple[str, int, int, int]] = []  # (device, first byte, end, index)
    for index, grad in odd:
        plain = type(grad) in (Tensor, nn.Parameter) and grad.layout == torch.strided
        start = grad.data_ptr() if plain and grad.device.type != "meta" else 0
        key = (start, grad.shape, grad.stride(), grad.dtype, grad.device) if start else id(grad)
        if key in seen:
            continue
        seen.add(key)
        unique.append((index, grad))
        if start and _has_no_holes(grad):
            ranges.append((str(grad.device), start, start + grad.nbytes, index))
    ranges.sort()
    for (device, _, end, i), (next_device, start, _, j) in itertools.pairwise(ranges):
        if device == next_device and start < end:
            raise ValueError(
                f"grads[{min(i, j)}] and grads[{max(i, j)}]: expected gradients that do not "
                f"overlap in memory, got {end - start} shared bytes or more; clone one of them"
            )
    return unique


def _has_no_holes(grad: Tensor) -> bool:
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )
    return extent == grad.numel()
