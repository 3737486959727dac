"""The clip as an operator of torch's dispatcher, so that ``torch.compile`` keeps one graph.

``torch.ops.fusedclip.clip_`` is opaque to the compiler: it sees a list of gradients that is written
and a scalar that comes back. Registered through ``torch.library.Library``, which costs a fraction
of ``torch.library.custom_op`` at import.
"""

# mypy: disable-error-code="no-untyped-call"
# torch.library.Library has no annotations.

import torch
from torch import Tensor

from fusedclip.backends import select
from fusedclip.gradients import gather
from fusedclip.pipeline import clip_gathered

_library = torch.library.Library("fusedclip", "DEF")
_library.define(
    "clip_(Tensor(a!)[] grads, Tensor max_norm, float norm_type, str nonfinite, str backend)"
    " -> Tensor"
)


def _clip(
    grads: list[Tensor], max_norm: Tensor, norm_type: float, nonfinite: str, backend: str
) -> Tensor:
    gathered = gather(grads, select.resolve(backend), from_parameters=False, norm_type=norm_type)
    limit = max_norm.item() if max_norm.device.type == "cpu" else max_norm
    return clip_gathered(grads, gathered, limit, norm_type, nonfinite, None, strict=True)


def _shape_of_clip(
    grads: list[Tensor], max_norm: Tensor, norm_type: float, nonfinite: str, backend: str
) -> Tensor:
    wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    return grads[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


_library.impl("clip_", _clip, "CompositeExplicitAutograd")
_library.impl("clip_", _shape_of_clip, "Meta")
