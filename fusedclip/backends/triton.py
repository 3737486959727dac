"""The Triton backend: the fused clip on any GPU that Triton knows, with no module to compile.

``grads`` is a ``TritonGradients``: the dense gradients of a call on one GPU. Nothing here waits for
the device. Where TRITON_INTERPRET=1 is set the kernels run on CPU tensors, to be tested.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fusedclip.backends import native
from fusedclip.backends.device_memory import DeviceMemory
from fusedclip.rule import may_write
from fusedclip.triton_kernels import device_types, interpreted

if TYPE_CHECKING:
    from fusedclip import _C
    from fusedclip.backends import triton_gradients
    from fusedclip.triton_kernels.launch import Work

    TritonGradients: TypeAlias = triton_gradients.TritonGradients | _C.TritonGradients

OLDEST = (3, 6)
_OLDEST_CAPABILITY = (8, 0)  # of NVIDIA GPUs, for Triton and for bfloat16


@functools.cache
def problem() -> str:
    """Why this backend cannot run here; empty when it can. Starts Triton where there is a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (torch's GPU builds bring it); pip install triton"
    if not interpreted() and not torch.accelerator.is_available():
        return f"torch {torch.__version__} sees no GPU"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"Triton {triton.__version__} is too old; {OLDEST[0]}.{OLDEST[1]} or later is needed"
    return "" if interpreted() else _device_problem()


def _device_problem() -> str:
    from triton.runtime import driver

    if torch.version.cuda is not None:
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < _OLDEST_CAPABILITY:
                return (
                    f"cuda:{index} is of compute capability {capability[0]}.{capability[1]}; "
                    f"{_OLDEST_CAPABILITY[0]}.{_OLDEST_CAPABILITY[1]} or later is needed"
                )
    try:
        driver.active.get_current_target()
    except Exception as error:  # no driver for this GPU, no C compiler for its launcher
        return f"Triton cannot start: {error}"
    return ""


def usable() -> bool:
    """Whether ``"auto"`` may use this backend: not before a GPU is initialised, when there are no
    gradients on it, and not in the interpreter, which is slow."""
    if interpreted():
        return False
    started = torch.cuda.is_initialized() or torch.xpu.is_initialized()  # type: ignore[no-untyped-call]
    return started and problem() == ""


def device_type() -> str:
    """The type of this machine's GPU; in the interpreter that of the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if interpreted() or accelerator is None else accelerator.type


def served_devices() -> int:
    """The types of devices that the kernels serve: bit t for DLPack's DLDeviceType t."""
    return sum(1 << number for name in device_types() for number in _DLPACK_TYPES[name])


_DLPACK_TYPES = {"cpu": (1,), "cuda": (2, 10), "xpu": (14,)}  # 10 is ROCm's


def clip_(
    grads: "TritonGradients",
    max_norms: float | Tensor,
    *,
    segments: Sequence[int] | None = None,
    infinity: bool,
    nonfinite: str,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tensor_norms: Tensor | None = None,
) -> Tensor | None:
    """As ``cuda.clip_``, for one norm.

    One launch on CUDA's devices; two on others, for long lists and where the device refuses one.
    """
    if segments is not None:
        return None
    from fusedclip.triton_kernels.clip import clip

    dtype = torch.float64 if grads.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=grads.device)
    if isinstance(max_norms, Tensor):
        max_norms = max_norms.to(grads.device, torch.float64, non_blocking=True)
    each = None if tensor_norms is None else range(len(grads))
    with _current(grads.device):
        clip(
            _work(grads, each, 1 if each is None else len(each)),
            maximum=infinity,
            nonfinite=nonfinite,
            totals=tensor_norms,
            num_totals=0 if tensor_norms is None else len(grads),
            norm=norm,
            max_norm=max_norms,
            inv_scale=inv_scale,
            found_inf=found_inf,
        )
    if tensor_norms is not None and not infinity:
        tensor_norms.sqrt_()
    if may_write(max_norms, nonfinite, unscaled=inv_scale is not None):
        native.bump_versions_unless_refused(grads.tensors, norm, nonfinite)
    return norm


def measure(
    grads: "TritonGradients", segments: Sequence[int] | None, *, infinity: bool, out: Tensor
) -> None:
    """As ``reference.measure``; ``out`` is on the gradients' device."""
    from fusedclip.triton_kernels.clip import clip

    with _current(grads.device):
        clip(
            _work(grads, segments, out.numel()),
            maximum=infinity,
            nonfinite=None,
            totals=out,
            num_totals=out.numel(),
        )


def scale_(
    grads: "TritonGradients",
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``. One launch; it writes nothing where the coefficient is 1."""
    from fusedclip.triton_kernels.scale import scale

    coefficient = coefficient.to(grads.device, torch.float64, non_blocking=True)
    with _current(grads.device):
        work = _work(grads, segments, coefficient.numel())
        scale(work, coefficients=coefficient, zero_fill=zero_fill)
    native.bump_versions(grads.tensors)


def nonfinite_indices(grads: "TritonGradients") -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf. Waits."""
    largest = torch.empty(len(grads), dtype=torch.float64, device=grads.device)
    measure(grads, range(len(grads)), infinity=True, out=largest)
    finite = largest.isfinite().tolist()
    return [index for index, good in zip(grads.indices, finite, strict=True) if not good]


_memory = DeviceMemory(zeroed=True, copied=True)  # the barrier counts from 0


def _work(grads: "TritonGradients", segments: Sequence[int] | None, num_segments: int) -> "Work":
    """The table and the memory of a launch on the current device."""
    from fusedclip.triton_kernels.launch import Work, current_stream, place_of, scratch_bytes
    from fusedclip.triton_kernels.table import lay_out

    index = grads.device.index or 0
    place = place_of(index).for_list(grads.total_bytes)
    layout = lay_out(
        grads.spans,
        None if segments is None else tuple(segments),
        num_segments,
        place.chunk_bytes(grads.total_bytes),
        grads.device.type != "cpu",
    )
    stream = current_stream(index)
    scratch = _memory.scratch(grads.device, stream, scratch_bytes(layout.num_chunks))
    words: Tensor = layout.words

    def make() -> Tensor:
        return torch.empty_like(words, device=grads.device)

    def write(table: Tensor) -> None:
        table.copy_(words, non_blocking=True)

    table = _memory.table(grads.device, stream, layout, make, write)
    return Work(place, table, scratch, layout.num_chunks)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current one, as Triton launches there."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return _NOTHING
    return torch.accelerator.device_index(device.index)


_NOTHING = contextlib.nullcontext()


if native.module is not None:
    native.module.TritonGradients.backend = sys.modules[__name__]
