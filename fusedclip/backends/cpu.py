"""The CPU backend: vectorised and threaded kernels of the compiled module.

``grads`` is a ``_C.CpuGradients``: the dense CPU gradients of a call, kept alive, with their
addresses and sizes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import native

_CPU = torch.device("cpu")


def problem() -> str:
    """Why this backend cannot run here; empty when it can."""
    if native.problem or hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return native.problem
    return f"torch {torch.__version__} has no DLPack exchange API; torch >= 2.10 is needed"


def device(grads: Any) -> torch.device:
    return _CPU


def clip_(
    grads: Any,
    max_norm: float,
    *,
    infinity: bool,
    nonfinite: str,
    inv_scale: float = 1.0,
    tensor_norms: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Measure, decide and scale in one call; the norm before clipping, 0-dim.

    Args:
        inv_scale: factor on each value (1 / AMP loss scale).
        tensor_norms: where the norms of single gradients go, fp64 with an entry for each position
            of the call's input (0 where it has no gradient).
        found_inf: scalar, set to 1 when the norm is not finite.
    """
    norm, written, bad = grads.clip_(
        max_norm, infinity, native.POLICIES[nonfinite], inv_scale, torch.get_num_threads(),
        tensor_norms,
    )  # fmt: skip
    if bad and found_inf is not None:
        found_inf.fill_(1.0)
    if written:
        native.bump_versions(grads.tensors)
    dtype = torch.float64 if grads.has_float64 else torch.float32
    return torch.scalar_tensor(norm, dtype=dtype, device=_CPU)


def clip_segments_(
    grads: Any, segments: Sequence[int], max_norms: Tensor, *, infinity: bool, nonfinite: str
) -> Tensor:
    """Each segment by a norm and a threshold of its own; the norms before clipping.

    Args:
        segments: the index into ``max_norms`` of each gradient.
        max_norms: fp64 ``[num_segments]``, on the CPU.
    """
    norms = torch.empty(max_norms.numel(), dtype=torch.float64, device="cpu")
    written, _ = grads.clip_segments_(
        _segment_tensor(segments), max_norms, norms, infinity, native.POLICIES[nonfinite],
        torch.get_num_threads(),
    )  # fmt: skip
    if written:
        native.bump_versions(grads.tensors)
    return norms if grads.has_float64 else norms.to(torch.float32)


def measure(
    grads: Any,
    segments: Sequence[int] | None,
    *,
    infinity: bool,
    inv_scale: float = 1.0,
    out: Tensor,
) -> None:
    """As ``reference.measure``; ``out`` is on the CPU."""
    grads.measure(out, _segment_tensor(segments), infinity, inv_scale, torch.get_num_threads())


def scale_(
    grads: Any,
    segments: Sequence[int] | None,
    coefficient: Tensor,
    *,
    zero_fill: bool = False,
) -> None:
    """As ``reference.scale_``; a coefficient on another device is waited for."""
    if grads.scale_(
        coefficient.cpu(), _segment_tensor(segments), zero_fill, torch.get_num_threads()
    ):
        native.bump_versions(grads.tensors)


def clamp_(grads: Any, limit: float) -> None:
    """Each element to [-limit, limit], for a limit that is finite in every type of ``grads``."""
    if grads.clamp_(limit, torch.get_num_threads()):
        native.bump_versions(grads.tensors)


def nonfinite_indices(grads: Any) -> list[int]:
    """The positions, in the call's input, of the gradients that hold NaN or inf."""
    return list(grads.nonfinite_indices())


def _segment_tensor(segments: Sequence[int] | None) -> Tensor | None:
    return None if segments is None else torch.tensor(segments, dtype=torch.int32, device="cpu")
