"""The CUDA backend: norm, decision and rescale in one cooperative launch on the current stream.

``grads`` is a ``_C.CudaGradients``: the dense gradients of a call on one GPU, kept alive, with
their addresses and sizes. Nothing here waits for the device. The kernels are handed their memory:
a few kilobytes of scratch and, for lists that the kernel's parameters cannot hold, a table of the
gradients; both are cached for each device and stream.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import native


def problem() -> str:
    """Why this backend cannot run here; empty when it can. Asks the driver for its devices."""
    if native.problem:
        return native.problem
    if not native.module.cuda_architectures():
        return "this build has no CUDA kernels; reinstall with nvcc and FUSEDCLIP_CUDA=1"
    if _emulated():
        return ""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    problems = [problem_of(index) for index in range(torch.cuda.device_count())]
    return "" if "" in problems else "; ".join(problems)


@functools.cache
def problem_of(index: int) -> str:
    """Why the kernels cannot run on ``cuda:index``; empty when they can."""
    if _emulated():
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    architectures = native.module.cuda_architectures()
    if _supported((major, minor), architectures):
        return ""
    return (
        f"cuda:{index} is of compute capability {major}.{minor}, this build is for "
        f"{', '.join(architectures)}; reinstall with FUSEDCLIP_CUDA_ARCHS={major}{minor}"
    )


def usable_devices() -> int:
    """The GPUs that this backend serves: bit i for ``cuda:i``.

    None before CUDA is initialised: then there are no gradients there either.
    """
    if native.module is None:
        return 0
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return _usable_devices() if _emulated() or initialized else 0


@functools.cache
def _usable_devices() -> int:
    if problem():
        return 0
    count = 1 if _emulated() else torch.cuda.device_count()
    return sum(1 << index for index in range(count) if not problem_of(index))


def device(grads: Any) -> torch.device:
    return torch.device(native.module.GPU_DEVICE_TYPE, grads.device_index)


def device_type() -> str:
    return "cuda" if native.module is None else str(native.module.GPU_DEVICE_TYPE)


def clip_(
    grads: Any,
    max_norm: float | Tensor,
    *,
    infinity: bool,
    nonfinite: str,
    inv_scale: Tensor | None = None,
    tensor_norms: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Measure, decide and scale in one launch; the norm before clipping, 0-dim, on the device.

    Args:
        max_norm: a number or a 0-dim tensor.
        inv_scale: fp32 scalar on the device, multiplied into every value (1 / AMP loss scale).
        tensor_norms: where the norm of each gradient goes, of the norm's dtype, ``[len(grads)]``.
        found_inf: fp32 scalar on the device, set to 1 when the norm is not finite.
    """
    memory = _memory(grads, grads.prepare(infinity, None, 1, tensor_norms is not None))
    where = device(grads)
    norm = torch.empty((), dtype=_norm_dtype(grads), device=where)
    limit, limits = (0.0, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)
    if limits is not None:
        limits = limits.detach().to(where, torch.float64, non_blocking=True)
    grads.launch(
        memory.scratch, memory.table, limit, limits, native.POLICIES[nonfinite], inv_scale, True,
        None, norm, tensor_norms, None, found_inf,
    )  # fmt: skip
    # Whether anything was written only the device knows; with an infinite threshold nothing is.
    if limit != math.inf or inv_scale is not None or nonfinite == "zero":
        native.bump_versions(grads.tensors)
    return norm


def measure(
    grads: Any,
    segments: Sequence[int] | None,
    *,
    infinity: bool,
    inv_scale: Tensor | float = 1.0,
    out: Tensor,
) -> None:
    """As ``reference.measure``; ``out`` is on the gradients' device. One launch."""
    memory = _memory(grads, grads.prepare(infinity, _int32(segments), out.numel(), False))
    factor: Tensor | None = None
    if isinstance(inv_scale, Tensor):
        factor = inv_scale
    elif inv_scale != 1.0:
        factor = torch.full((), inv_scale, device=out.device)
    grads.launch(
        memory.scratch, memory.table, 0.0, None, 0, factor, False, out, None, None, None, None
    )


def scale_(
    grads: Any,
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``. One launch, which ends at once when the coefficient is 1."""
    memory = _memory(grads, grads.prepare(False, _int32(segments), coefficient.numel(), False))
    coefficient = coefficient.to(device(grads), torch.float64, non_blocking=True)
    grads.scale_(memory.table, coefficient, zero_fill)
    native.bump_versions(grads.tensors)


def nonfinite_indices(grads: Any) -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf. Waits."""
    largest = torch.empty(len(grads), dtype=torch.float64, device=device(grads))
    measure(grads, range(len(grads)), infinity=True, out=largest)
    finite = largest.isfinite().tolist()
    return [index for index, good in zip(grads.indices, finite, strict=True) if not good]


@dataclass(frozen=True)
class _Memory:
    """What the kernels of one stream are handed. A launch uses it after those before it."""

    scratch: Tensor | None = None
    table: Tensor | None = None
    entries: bytes = b""  # what is in the table

    def holds(self, scratch_bytes: int) -> bool:
        return self.scratch is not None and self.scratch.numel() >= scratch_bytes


_cached: dict[tuple[torch.device, int], _Memory] = {}


def _memory(grads: Any, plan: tuple[int, int]) -> _Memory:
    scratch_bytes, table_bytes = plan
    where = device(grads)
    key = (where, grads.stream)
    # A captured graph has its own: another launch must not find it in use at a replay.
    capturing = not _emulated() and torch.cuda.is_current_stream_capturing()
    memory = _Memory() if capturing else _cached.get(key, _Memory())
    scratch, table, entries = memory.scratch, memory.table, memory.entries
    if not memory.holds(scratch_bytes):
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=where)
    if table_bytes and (wanted := grads.table()) != entries:
        table = torch.empty(table_bytes, dtype=torch.uint8, device=where)
        grads.write_table(wanted, table)
        entries = wanted
    current = _Memory(scratch, table, entries)
    if not capturing:
        _cached[key] = current
    return current


def _norm_dtype(grads: Any) -> torch.dtype:
    return torch.float64 if grads.has_float64 else torch.float32


def _int32(segments: Sequence[int] | None) -> Tensor | None:
    return None if segments is None else torch.tensor(segments, dtype=torch.int32, device="cpu")


def _emulated() -> bool:
    """Whether the module is the tests' own, whose kernels run on the CPU."""
    return bool(native.module.GPU_DEVICE_TYPE == "cpu")


def _supported(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs on later minor versions of its major one, PTX on everything later."""
    own = 10 * capability[0] + capability[1]
    for name in architectures:
        kind, number = name.split("_")
        built = int(number.rstrip("af"))
        if built <= own and (kind == "compute" or built // 10 == capability[0]):
            return True
    return False
