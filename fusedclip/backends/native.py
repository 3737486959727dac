"""The compiled module ``fusedclip._C``, or the reason why it is not here.

The module needs no torch to build, so it may be missing (no compiler at installation) or fail to
load; ``problem`` then holds the reason, and ``select`` turns to other backends. ``backends.cpu``
and ``backends.cuda`` are Python's view of what it can do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedclip.backends import reference

problem: str
try:
    import fusedclip._C as compiled

    module, problem = compiled, ""
except ImportError as error:
    module = None  # type: ignore[assignment]
    problem = (
        f"the native module fusedclip._C is not available ({error}); "
        "reinstall with a C++17 compiler and FUSEDCLIP_REQUIRE_NATIVE=1 to see why"
    )

# As the kernels number them: enum class Nonfinite in csrc/clip.h.
NONFINITE = {name: number for number, name in enumerate(reference.NONFINITE)}


def bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that the tensors were written, as an in-place operation of torch would."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors keep no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def bump_versions_unless_refused(tensors: list[Tensor], norms: Tensor, nonfinite: str) -> None:
    """``bump_versions`` after a launch on a GPU, which does not tell the host what it wrote.

    ``"error"`` reads the norms, and so waits: a clip that was refused leaves the versions too.
    """
    if nonfinite != "error" or bool(norms.isfinite().all()):
        bump_versions(tensors)


def segment_tensor(segments: Sequence[int] | None) -> Tensor | None:
    """Segments as the module takes them."""
    if isinstance(segments, range):  # a tenth of the time that a list of them takes
        return torch.arange(segments.start, segments.stop, dtype=torch.int32, device="cpu")
    return None if segments is None else torch.tensor(segments, dtype=torch.int32, device="cpu")
