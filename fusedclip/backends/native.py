"""The compiled module ``fusedclip._C``, or the reason why it is not here.

The module needs no torch to build, so it may be missing (no compiler at installation) or fail to
load; ``problem`` then holds the reason, and ``select`` turns to other backends. ``backends.cpu``
and ``backends.cuda`` are Python's view of what it can do.
"""

import importlib
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

POLICIES = {
    "propagate": 0,
    "zero": 1,
    "error": 2,
    "unclipped": 3,
}  # enum class Nonfinite in csrc/clip.h


def bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that the tensors were written, as an in-place operation of torch would."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors keep no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def bump_versions_unless_refused(tensors: list[Tensor], norms: Tensor, nonfinite: str) -> None:
    """After a launch of which only the device knows whether it wrote.

    ``"error"`` waits for the device in any case: a clip that was refused leaves the versions too.
    """
    if nonfinite != "error" or bool(norms.isfinite().all()):
        bump_versions(tensors)
