"""The CUDA backend: norm, decision and rescale in one cooperative launch on the current stream.

``grads`` is a ``_C.CudaGradients``: the dense gradients of a call on one GPU, kept alive, with
their addresses and sizes. Nothing here waits for the device. The kernels are handed their memory:
a few kilobytes of scratch and, for lists that the kernel's parameters cannot hold, a table of the
gradients; both are cached for each device and stream.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import native
from fusedclip.backends.device_memory import DeviceMemory


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
    count = _all_devices().bit_length()
    return sum(1 << index for index in range(count) if not problem_of(index))


def serves_all(devices: int) -> bool:
    """Whether no GPU is left out of ``devices``."""
    return devices != 0 and devices == _all_devices()


@functools.cache
def _all_devices() -> int:
    return 1 if _emulated() else (1 << torch.cuda.device_count()) - 1


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
    scratch, table = _handed(grads, grads.prepare(infinity, None, 1, tensor_norms is not None))
    where = device(grads)
    dtype = torch.float64 if grads.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=where)
    limit, limits = (0.0, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)
    if limits is not None:
        limits = limits.detach().to(where, torch.float64, non_blocking=True)
    grads.launch(
        scratch, table, limit, limits, native.POLICIES[nonfinite], inv_scale, True,
        None, norm, tensor_norms, None, found_inf,
    )  # fmt: skip
    # Whether anything was written only the device knows; with an infinite threshold nothing is.
    if limit != math.inf or inv_scale is not None or nonfinite == "zero":
        native.bump_versions_unless_refused(grads.tensors, norm, nonfinite)
    return norm


def clip_segments_(
    grads: Any, segments: Sequence[int], max_norms: Tensor, *, infinity: bool, nonfinite: str
) -> Tensor:
    """As ``cpu.clip_segments_``, in one launch; ``max_norms`` is on the device."""
    count = max_norms.numel()
    scratch, table = _handed(grads, grads.prepare(infinity, _int32(segments), count, False))
    dtype = torch.float64 if grads.has_float64 else torch.float32
    norms = torch.empty(count, dtype=dtype, device=device(grads))
    grads.launch(
        scratch, table, 0.0, max_norms, native.POLICIES[nonfinite], None, True, None, norms, None,
        None, None,
    )  # fmt: skip
    native.bump_versions_unless_refused(grads.tensors, norms, nonfinite)
    return norms


def measure(
    grads: Any,
    segments: Sequence[int] | None,
    *,
    infinity: bool,
    inv_scale: Tensor | float = 1.0,
    out: Tensor,
) -> None:
    """As ``reference.measure``; ``out`` is on the gradients' device. One launch."""
    scratch, table = _handed(grads, grads.prepare(infinity, _int32(segments), out.numel(), False))
    factor: Tensor | None = None
    if isinstance(inv_scale, Tensor):
        factor = inv_scale
    elif inv_scale != 1.0:
        factor = torch.full((), inv_scale, device=out.device)
    grads.launch(scratch, table, 0.0, None, 0, factor, False, out, None, None, None, None)


def scale_(
    grads: Any,
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``. One launch, which ends at once when the coefficient is 1."""
    _, table = _handed(grads, grads.prepare(False, _int32(segments), coefficient.numel(), False))
    coefficient = coefficient.to(device(grads), torch.float64, non_blocking=True)
    grads.scale_(table, coefficient, zero_fill)
    native.bump_versions(grads.tensors)


def nonfinite_indices(grads: Any) -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf. Waits."""
    largest = torch.empty(len(grads), dtype=torch.float64, device=device(grads))
    measure(grads, range(len(grads)), infinity=True, out=largest)
    finite = largest.isfinite().tolist()
    return [index for index, good in zip(grads.indices, finite, strict=True) if not good]


_memory = DeviceMemory()


def _handed(grads: Any, plan: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Scratch memory for a plan and, for a list that the parameters cannot hold, its table."""
    scratch_bytes, table_bytes = plan
    where, stream = device(grads), grads.stream
    scratch = _memory.scratch(where, stream, scratch_bytes)
    if not table_bytes:
        return scratch, None
    entries = grads.table()  # bytes

    def write() -> Tensor:
        table = torch.empty(table_bytes, dtype=torch.uint8, device=where)
        grads.write_table(entries, table)
        return table

    return scratch, _memory.table(where, stream, entries, write)


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
