"""The CUDA backend: norm, decision and rescale in one cooperative launch on the current stream, or
in one launch for each phase (long lists, and devices that refuse such a grid).

``grads`` is a ``_C.CudaGradients``: the dense gradients of a call on one GPU, kept alive, with
their addresses and sizes. Nothing here waits for the device. The kernels are handed their memory:
a few kilobytes of scratch and, for lists that the kernel's parameters cannot hold, a table of the
gradients; both are cached for each device and stream.
"""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedclip.backends import native
from fusedclip.backends.device_memory import DeviceMemory
from fusedclip.backends.native import NONFINITE, segment_tensor
from fusedclip.rule import may_write

if TYPE_CHECKING:
    from fusedclip._C import CudaGradients


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
    # A build of torch without CUDA has no gradients for these kernels, unless they are emulated.
    if native.module is None or (torch.version.cuda is None and not _emulated()):
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


def device_type() -> str:
    """The type of the devices that it serves; in the tests' emulator that of the CPU."""
    return "cuda" if native.module is None else native.module.GPU_DEVICE_TYPE


def clip_(
    grads: "CudaGradients",
    max_norms: float | Tensor,
    *,
    segments: Sequence[int] | None = None,
    infinity: bool,
    nonfinite: str,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tensor_norms: Tensor | None = None,
) -> Tensor | None:
    """Measure, decide and scale, fused.

    Args:
        max_norms: a number or a 0-dim tensor for the one norm, or fp64 ``[num_segments]``.
        segments: the norm that each gradient counts towards; ``None``: all are of the first.
        inv_scale: fp32 scalar on the device, multiplied into every value (1 / AMP loss scale).
        found_inf: fp32 scalar on the device, set to 1 when a norm is not finite.
        tensor_norms: fp64 ``[len(grads)]`` on the device, where the norm of each gradient goes.

    Returns:
        The norms before clipping on the device, 0-dim or ``[num_segments]``; ``None``, and nothing
        was done, where this combination has no fused form.
    """
    if segments is not None and tensor_norms is not None:
        return None
    by_segment = isinstance(max_norms, Tensor) and max_norms.dim() == 1
    count = max_norms.numel() if isinstance(max_norms, Tensor) else 1
    scratch, table = _handed(
        grads, grads.prepare(infinity, segment_tensor(segments), count, tensor_norms is not None)
    )
    dtype = torch.float64 if grads.has_float64 else torch.float32
    norms = torch.empty((count,) if by_segment else (), dtype=dtype, device=grads.device)
    limit, limits = (0.0, max_norms) if isinstance(max_norms, Tensor) else (max_norms, None)
    if limits is not None:
        limits = limits.detach().to(grads.device, torch.float64, non_blocking=True)
    own = None if tensor_norms is None else torch.empty_like(tensor_norms, dtype=dtype)
    grads.launch(
        scratch, table, limit, limits, NONFINITE[nonfinite], inv_scale, True, None, norms, own,
        found_inf,
    )  # fmt: skip
    if tensor_norms is not None and own is not None:
        tensor_norms.copy_(own)
    if may_write(max_norms, nonfinite, unscaled=inv_scale is not None):
        native.bump_versions_unless_refused(grads.tensors, norms, nonfinite)
    return norms


def plain_memory(
    index: int, stream: int, scratch_bytes: int, float64: bool
) -> tuple[Tensor, Tensor]:
    """The memory that ``_C.plain_clip_`` needs on ``cuda:index``: scratch and the norm's place."""
    device = torch.device(native.module.GPU_DEVICE_TYPE, index)
    dtype = torch.float64 if float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=device)
    return _memory.scratch(device, stream, scratch_bytes), norm


def measure(
    grads: "CudaGradients", segments: Sequence[int] | None, *, infinity: bool, out: Tensor
) -> None:
    """As ``reference.measure``; ``out`` is on the gradients' device."""
    plan = grads.prepare(infinity, segment_tensor(segments), out.numel(), False)
    scratch, table = _handed(grads, plan)
    grads.launch(scratch, table, 0.0, None, 0, None, False, out, None, None, None)


def scale_(
    grads: "CudaGradients",
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``. One launch, which ends at once when the coefficient is 1."""
    plan = grads.prepare(False, segment_tensor(segments), coefficient.numel(), False)
    _, table = _handed(grads, plan)
    coefficient = coefficient.to(grads.device, torch.float64, non_blocking=True)
    grads.scale_(table, coefficient, zero_fill)
    native.bump_versions(grads.tensors)


def nonfinite_indices(grads: "CudaGradients") -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf. Waits."""
    largest = torch.empty(len(grads), dtype=torch.float64, device=grads.device)
    measure(grads, range(len(grads)), infinity=True, out=largest)
    finite = largest.isfinite().tolist()
    return [index for index, good in zip(grads.indices, finite, strict=True) if not good]


_memory = DeviceMemory()


def _handed(grads: "CudaGradients", plan: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Scratch memory for a plan and, for a list that the parameters cannot hold, its table."""
    scratch_bytes, table_bytes = plan
    where, stream = grads.device, grads.stream
    scratch = _memory.scratch(where, stream, scratch_bytes)
    if not table_bytes:
        return scratch, None
    entries = grads.table()  # bytes

    def make() -> Tensor:
        return torch.empty(table_bytes, dtype=torch.uint8, device=where)

    def write(table: Tensor) -> None:
        grads.write_table(entries, table)

    return scratch, _memory.table(where, stream, entries, make, write)


def _emulated() -> bool:
    """Whether the module is the tests' own, whose kernels run on the CPU."""
    return native.module.GPU_DEVICE_TYPE == "cpu"


def _supported(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs on later minor versions of its major one, PTX on everything later."""
    own = 10 * capability[0] + capability[1]
    for name in architectures:
        kind, number = name.split("_")
        built = int(number.rstrip("af"))
        if built <= own and (kind == "compute" or built // 10 == capability[0]):
            return True
    return False


if native.module is not None and hasattr(native.module, "CudaGradients"):
    native.module.CudaGradients.backend = sys.modules[__name__]
    native.module.CudaGradients.device = property(  # type: ignore[assignment]
        lambda grads: torch.device(native.module.GPU_DEVICE_TYPE, grads.device_index)
    )
