"""fusedclip: gradient clipping for PyTorch as one fused pass.

``fusedclip.clip_(model, max_norm=1.0)`` between ``loss.backward()`` and ``optimizer.step()`` is all
a training loop needs. The torch-named functions are drop-ins for those of ``torch.nn.utils``.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# First: under ``fusedclip run`` the import of torch itself imports parts of this package, which
# must not be half done by then.
import torch as _torch  # noqa: F401

from fusedclip._version import __version__
from fusedclip.backends.select import available_backends
from fusedclip.errors import NonfiniteGradientError
from fusedclip.functional import (
    clip_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_tensor_norms,
    get_total_norm,
)

if _TYPE_CHECKING:
    from fusedclip import amp as amp
    from fusedclip import compare as compare
    from fusedclip.agc import agc_
    from fusedclip.clipper import Clipper
    from fusedclip.config import ClipConfig
    from fusedclip.integrations.torch import patch, unpatch
    from fusedclip.monitor import Monitor
    from fusedclip.policies import AdaGC, AutoClip, SkipSpikes, ZClip
    from fusedclip.recommendation import Recommendation, recommend

__all__ = [
    "AdaGC",
    "AutoClip",
    "ClipConfig",
    "Clipper",
    "Monitor",
    "NonfiniteGradientError",
    "Recommendation",
    "SkipSpikes",
    "ZClip",
    "__version__",
    "agc_",
    "available_backends",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_tensor_norms",
    "get_total_norm",
    "patch",
    "recommend",
    "unpatch",
]

# Imported at first use, so that a script that only clips does not wait for them.
_LATER = {
    "ClipConfig": "fusedclip.config",
    "Clipper": "fusedclip.clipper",
    "Monitor": "fusedclip.monitor",
    "AdaGC": "fusedclip.policies",
    "AutoClip": "fusedclip.policies",
    "Recommendation": "fusedclip.recommendation",
    "SkipSpikes": "fusedclip.policies",
    "ZClip": "fusedclip.policies",
    "agc_": "fusedclip.agc",
    "patch": "fusedclip.integrations.torch",
    "unpatch": "fusedclip.integrations.torch",
    "recommend": "fusedclip.recommendation",
}


def __getattr__(name: str) -> _Any:
    if name in ("amp", "compare", "integrations"):
        return _importlib.import_module(f"fusedclip.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'fusedclip' has no attribute {name!r}")
    globals()[name] = value = getattr(_importlib.import_module(_LATER[name]), name)
    return value
