"""The CPU backend: vectorised and threaded kernels of the compiled module.

``grads`` is a ``_C.CpuGradients``: the dense CPU gradients of a call, kept alive, with their
addresses and sizes.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedclip.backends import native

if TYPE_CHECKING:
    from fusedclip._C import CpuGradients

_CPU = torch.device("cpu")


def problem() -> str:
    """Why this backend cannot run here; empty when it can."""
    if native.problem or hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return native.problem
    return f"torch {torch.__version__} has no DLPack exchange API; torch >= 2.10 is needed"


def device_type() -> str:
    """The type of the devices that it serves."""
    return "cpu"


def clip_(
    grads: "CpuGradients",
    max_norms: float | Tensor,
    *,
    segments: Sequence[int] | None = None,
    infinity: bool,
    nonfinite: str,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tensor_norms: Tensor | None = None,
) -> Tensor | None:
    """As ``cuda.clip_``, where the thresholds are on the CPU."""
    if isinstance(max_norms, Tensor) and max_norms.device != _CPU:
        return None
    limit, limits, norms = 0.0, None, None
    if isinstance(max_norms, Tensor) and max_norms.dim() == 1:
        limits, norms = max_norms, torch.empty_like(max_norms)
    else:
        limit = float(max_norms)
    norm, written, bad = grads.clip_(
        native.segment_tensor(segments), limit, limits, infinity, native.NONFINITE[nonfinite],
        1.0 if inv_scale is None else inv_scale.item(), torch.get_num_threads(), norms,
        tensor_norms,
    )  # fmt: skip
    if bad and found_inf is not None:
        found_inf.fill_(1.0)
    if written:
        native.bump_versions(grads.tensors)
    if norms is None:
        return scalar(norm, grads.has_float64)
    return norms if grads.has_float64 else norms.to(torch.float32)


def scalar(value: float, float64: bool) -> Tensor:
    """A 0-dim tensor on the CPU, whatever the default device and type are."""
    dtype = torch.float64 if float64 else torch.float32
    return torch.scalar_tensor(value, dtype=dtype, device=_CPU)


def measure(
    grads: "CpuGradients", segments: Sequence[int] | None, *, infinity: bool, out: Tensor
) -> None:
    """As ``reference.measure``; ``out`` is on the CPU."""
    grads.measure(out, native.segment_tensor(segments), infinity, torch.get_num_threads())


def scale_(
    grads: "CpuGradients",
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``; a coefficient on another device is waited for."""
    if grads.scale_(
        coefficient.cpu(), native.segment_tensor(segments), zero_fill, torch.get_num_threads()
    ):
        native.bump_versions(grads.tensors)


def clamp_(grads: "CpuGradients", limit: float) -> None:
    """Each element to [-limit, limit], for a limit that is finite in every type of ``grads``."""
    if grads.clamp_(limit, torch.get_num_threads()):
        native.bump_versions(grads.tensors)


def nonfinite_indices(grads: "CpuGradients") -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf."""
    return grads.nonfinite_indices()


if native.module is not None:
    native.module.CpuGradients.backend = sys.modules[__name__]
    native.module.CpuGradients.device = _CPU
