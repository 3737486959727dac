"""The Triton backend: the fused clip on any GPU that Triton knows, with no module to compile.

``grads`` is a ``TritonGradients``: the dense gradients of a call on one GPU. Nothing here waits for
the device. Where TRITON_INTERPRET=1 is set the kernels run on CPU tensors, to be tested.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedclip.backends import native
from fusedclip.backends.device_memory import DeviceMemory
from fusedclip.triton_kernels import interpreted

if TYPE_CHECKING:
    from fusedclip.backends.triton_gradients import TritonGradients
    from fusedclip.triton_kernels.launch import Work

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
    """Whether ``"auto"`` may send GPU gradients here. Before a GPU is initialised there are none,
    and the interpreter is too slow to be chosen for anyone."""
    if interpreted():
        return False
    started = torch.cuda.is_initialized() or torch.xpu.is_initialized()  # type: ignore[no-untyped-call]
    return started and problem() == ""


def device_type() -> str:
    """The type of this machine's GPU; in the interpreter that of the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if interpreted() or accelerator is None else accelerator.type


def device(grads: "TritonGradients") -> torch.device:
    return grads.device


def clip_(
    grads: "TritonGradients",
    max_norm: float | Tensor,
    *,
    infinity: bool,
    nonfinite: str,
    inv_scale: Tensor | None = None,
    tensor_norms: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """As ``cuda.clip_``: measure, decide and scale; the norm before clipping, 0-dim, on the device.

    One launch on CUDA's devices, two on others.
    """
    from fusedclip.triton_kernels.clip import clip

    dtype = torch.float64 if grads.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=grads.device)
    if isinstance(max_norm, Tensor):
        max_norm = max_norm.to(grads.device, torch.float64, non_blocking=True)
    segments, totals = None, None
    if tensor_norms is not None:
        segments = range(len(grads))
        totals = torch.empty(len(grads), dtype=torch.float64, device=grads.device)
    with _current(grads.device):
        clip(
            _work(grads, segments, 1 if segments is None else len(segments)),
            maximum=infinity,
            policy=nonfinite,
            totals=totals,
            num_totals=0 if totals is None else len(grads),
            norm=norm,
            max_norm=max_norm,
            inv_scale=inv_scale,
            found_inf=found_inf,
        )
    if tensor_norms is not None and totals is not None:
        tensor_norms.copy_(totals if infinity else totals.sqrt())
    # Whether anything was written only the device knows; with an infinite threshold nothing is.
    never = not isinstance(max_norm, Tensor) and max_norm == math.inf
    if not never or inv_scale is not None or nonfinite == "zero":
        native.bump_versions_unless_refused(grads.tensors, norm, nonfinite)
    return norm


def measure(
    grads: "TritonGradients",
    segments: Sequence[int] | None,
    *,
    infinity: bool,
    inv_scale: Tensor | float = 1.0,
    out: Tensor,
) -> None:
    """As ``reference.measure``; ``out`` is on the gradients' device."""
    from fusedclip.triton_kernels.clip import clip

    factor: Tensor | None
    if isinstance(inv_scale, Tensor):
        factor = inv_scale
    else:
        factor = None if inv_scale == 1.0 else torch.full((), inv_scale, device=out.device)
    with _current(grads.device):
        clip(
            _work(grads, segments, out.numel()),
            maximum=infinity,
            policy="measure only",
            totals=out,
            num_totals=out.numel(),
            inv_scale=factor,
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


_memory = DeviceMemory(zeroed=True)  # the barrier counts from 0


def _work(grads: "TritonGradients", segments: Sequence[int] | None, num_segments: int) -> "Work":
    """The table and the memory of a launch on the current device."""
    from fusedclip.triton_kernels.launch import Work, current_stream, place_of, scratch_bytes
    from fusedclip.triton_kernels.table import lay_out

    index = grads.device.index or 0
    place = place_of(index)
    layout = lay_out(
        grads.spans,
        None if segments is None else tuple(segments),
        num_segments,
        place.chunk_bytes(grads.spans.total_bytes),
        grads.device.type != "cpu",
    )
    stream = current_stream(index)
    scratch = _memory.scratch(grads.device, stream, scratch_bytes(layout.num_chunks))
    words: Tensor = layout.words

    def copy() -> Tensor:
        return words.to(grads.device, non_blocking=True, copy=True)

    return Work(
        place, _memory.table(grads.device, stream, layout, copy), scratch, layout.num_chunks
    )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current one, as Triton launches there."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return _NOTHING
    return torch.accelerator.device_index(device.index)


_NOTHING = contextlib.nullcontext()
