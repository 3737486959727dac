"""The CUDA backend: norm, decision and rescale in one cooperative launch on the current stream.

``grads`` is a ``_C.CudaGradients``: the dense gradients of a call on one GPU, kept alive, with
their addresses and sizes. Nothing here waits for the device. The kernels are handed their memory:
a few kilobytes of scratch and, for lists that the kernel's parameters cannot hold, a table of the
gradients; both are cached for each device and stream.
"""

import functools
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
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not _supported(capability, native.module.cuda_architectures()):
            return (
                f"cuda:{index} is of compute capability {capability[0]}.{capability[1]}, this "
                f"build is for {', '.join(native.module.cuda_architectures())}; "
                f"reinstall with FUSEDCLIP_CUDA_ARCHS={capability[0]}{capability[1]}"
            )
    return ""


def usable() -> bool:
    """Whether GPU gradients can come here. Before CUDA is initialised there are none."""
    if native.module is None:
        return False
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return (_emulated() or initialized) and _usable()


def device(grads: Any) -> torch.device:
    return torch.device(native.module.GPU_DEVICE_TYPE, grads.device_index)


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
        max_norm: a number or a 0-dim tensor on the device.
        inv_scale: fp32 scalar on the device, multiplied into every value (1 / AMP loss scale).
        tensor_norms: where the norm of each gradient goes, of the norm's dtype, ``[len(grads)]``.
        found_inf: fp32 scalar on the device, set to 1 when the norm is not finite.
    """
    scratch, table = _handed(grads, grads.prepare(infinity, None, 1, tensor_norms is not None))
    dtype = torch.float64 if grads.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=device(grads))
    limit, limits = (0.0, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)
    if limits is not None:
        limits = limits.to(norm.device, torch.float64, non_blocking=True)
    grads.launch(
        scratch, table, limit, limits, native.POLICIES[nonfinite], inv_scale, True,
        None, norm, tensor_norms, None, found_inf,
    )  # fmt: skip
    native.bump_versions(grads.tensors)  # whether it was written only the device knows
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
    plan = grads.prepare(infinity, _segment_tensor(segments), out.numel(), False)
    scratch, table = _handed(grads, plan)
    if not isinstance(inv_scale, Tensor):
        factor = None if inv_scale == 1.0 else torch.full((), inv_scale, device=out.device)
    else:
        factor = inv_scale
    grads.launch(scratch, table, 0.0, None, 0, factor, False, out, None, None, None, None)


def scale_(
    grads: Any,
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``. One launch, which ends at once when the coefficient is 1."""
    plan = grads.prepare(False, _segment_tensor(segments), coefficient.numel(), False)
    _, table = _handed(grads, plan)
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
    memory = _memory.of_stream(device(grads), grads.stream, scratch_bytes)
    if not table_bytes:
        return memory.scratch, None
    pinned = not _emulated()
    host = torch.empty(table_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    grads.write_table(host)
    return memory.scratch, _memory.put_table(memory, host)


def _segment_tensor(segments: Sequence[int] | None) -> Tensor | None:
    return None if segments is None else torch.tensor(segments, dtype=torch.int32, device="cpu")


def _emulated() -> bool:
    """Whether the module is the tests' own, whose kernels run on the CPU."""
    return bool(native.module.GPU_DEVICE_TYPE == "cpu")


@functools.cache
def _usable() -> bool:
    return problem() == ""


def _supported(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs on later minor versions of its major one, PTX on everything later."""
    own = 10 * capability[0] + capability[1]
    for name in architectures:
        kind, number = name.split("_")
        built = int(number.rstrip("af"))
        if built <= own and (kind == "compute" or built // 10 == capability[0]):
            return True
    return False
