"""The CUDA backend: norm, decision and rescale in one cooperative launch on the current stream.

``grads`` is a ``_C.CudaGradients``: the dense gradients of a call on one GPU, kept alive, with
their addresses and sizes. Nothing here waits for the device. The kernels are handed their memory:
a few kilobytes of scratch and, for lists that the kernel's parameters cannot hold, a table of the
gradients; both are cached for each device and stream.
"""

import functools
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
    memory = _memory(grads, grads.prepare(infinity, None, 1, tensor_norms is not None))
    dtype = torch.float64 if grads.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=device(grads))
    limit, limits = (0.0, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)
    if limits is not None:
        limits = limits.to(norm.device, torch.float64, non_blocking=True)
    grads.launch(
        memory.scratch, memory.table, limit, limits, native.POLICIES[nonfinite], inv_scale, True,
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
    memory = _memory(grads, plan)
    if not isinstance(inv_scale, Tensor):
        factor = None if inv_scale == 1.0 else torch.full((), inv_scale, device=out.device)
    else:
        factor = inv_scale
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
    plan = grads.prepare(False, _segment_tensor(segments), coefficient.numel(), False)
    memory = _memory(grads, plan)
    coefficient = coefficient.to(device(grads), torch.float64, non_blocking=True)
    grads.scale_(memory.table, coefficient, zero_fill)
    native.bump_versions(grads.tensors)


def nonfinite_indices(grads: Any) -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf. Waits."""
    largest = torch.empty(len(grads), dtype=torch.float64, device=device(grads))
    measure(grads, range(len(grads)), infinity=True, out=largest)
    finite = largest.isfinite().tolist()
    return [index for index, good in zip(grads.indices, finite, strict=True) if not good]


@dataclass
class _Memory:
    """What the kernels of one stream are handed."""

    scratch: Tensor
    table: Tensor | None = None
    host_table: Tensor | None = None  # what the table was copied from


_cached: dict[tuple[torch.device, int], _Memory] = {}
_captured: list[Tensor] = []  # host tables that graphs copy from at every replay


def _memory(grads: Any, plan: tuple[int, int]) -> _Memory:
    scratch_bytes, table_bytes = plan
    where = device(grads)
    if torch.cuda.is_current_stream_capturing():
        # A graph's own: another launch must not find it in use at a replay.
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=where)
        memory = _Memory(scratch)
    else:
        key = (where, grads.stream)
        memory = _cached.get(key) or _Memory(torch.empty(0, dtype=torch.uint8, device=where))
        if memory.scratch.numel() < scratch_bytes:
            memory.scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=where)
        _cached[key] = memory
    if table_bytes:
        return _with_table(memory, grads, table_bytes)
    return _Memory(memory.scratch)


def _with_table(memory: _Memory, grads: Any, table_bytes: int) -> _Memory:
    """``memory`` with the table of ``grads`` in it, copied only when it has changed."""
    pinned = not _emulated()
    host = torch.empty(table_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    grads.write_table(host)
    if memory.host_table is None or not torch.equal(memory.host_table, host):
        memory.table = host.to(memory.scratch.device, non_blocking=True, copy=True)
        memory.host_table = host
        if torch.cuda.is_current_stream_capturing():
            _captured.append(host)
    return memory


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
