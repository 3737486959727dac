"""fusedclip: gradient clipping for PyTorch as one fused pass.

``fusedclip.clip_(model, max_norm=1.0)`` between ``loss.backward()`` and ``optimizer.step()`` is all
a training loop needs. The torch-named functions are drop-ins for those of ``torch.nn.utils``.
"""

from fusedclip import amp as amp
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
