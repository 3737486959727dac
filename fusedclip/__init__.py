"""fusedclip: gradient clipping for PyTorch as one fused pass.

``fusedclip.clip_(model, max_norm=1.0)`` between ``loss.backward()`` and ``optimizer.step()`` is all
a training loop needs. The torch-named functions are drop-ins for those of ``torch.nn.utils``.
"""

import importlib as _importlib
import typing as _typing

from fusedclip import operator as _operator  # noqa: F401, registers torch.ops.fusedclip.clip_
from fusedclip._version import __version__
from fusedclip.backends.select import available_backends
from fusedclip.clip import (
    clip_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_tensor_norms,
    get_total_norm,
)
from fusedclip.errors import NonfiniteGradientError
from fusedclip.patch import patch, unpatch

if _typing.TYPE_CHECKING:
    from fusedclip import amp as amp

__all__ = [
    "NonfiniteGradientError",
    "__version__",
    "available_backends",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_tensor_norms",
    "get_total_norm",
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> _typing.Any:
    """``fusedclip.amp``, imported when it is first asked for."""
    if name == "amp":
        return _importlib.import_module("fusedclip.amp")
    raise AttributeError(f"module 'fusedclip' has no attribute {name!r}")
