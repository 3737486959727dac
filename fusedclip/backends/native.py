"""The native backend: Python's view of the compiled module ``fusedclip._C``.

The module needs no torch to build, so it may be missing (no compiler at installation) or fail to
load; ``problem`` then holds the reason, and ``select`` turns to the reference. ``grads`` is a
``_C.Gradients``: the dense CPU gradients of a call, kept alive, with their addresses and sizes.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

module: Any
problem: str
try:
    module, problem = importlib.import_module("fusedclip._C"), ""
except ImportError as error:
    module = None
    problem = (
        f"the native module fusedclip._C is not available ({error}); "
        "reinstall with a C++17 compiler and FUSEDCLIP_REQUIRE_NATIVE=1 to see why"
    )

_POLICIES = {"propagate": 0, "zero": 1, "error": 2}


def clip_(
    grads: Any, max_norm: float, *, infinity: bool, nonfinite: str, inv_scale: float = 1.0
) -> tuple[float, bool]:
    """Measure, decide and scale in one call: the norm before clipping, and whether it is finite."""
    norm, written, bad = grads.clip_(
        max_norm, infinity, _POLICIES[nonfinite], inv_scale, torch.get_num_threads()
    )
    if written:
        _bump_versions(grads.tensors)
    return norm, not bad


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
        _bump_versions(grads.tensors)


def _segment_tensor(segments: Sequence[int] | None) -> Tensor | None:
    return None if segments is None else torch.tensor(segments, dtype=torch.int32, device="cpu")


def _bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that the tensors were written, as an in-place operation of torch would."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors keep no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
