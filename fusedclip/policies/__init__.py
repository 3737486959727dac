"""Decisions that follow the training: ``AutoClip``, ``ZClip``, ``AdaGC``, ``SkipSpikes``.

A policy sees the norms of each step before clipping and answers with coefficients and with whether
to take the step. What it remembers lives in tensors beside the norms, a row for each norm, and all
branches are ``torch.where``: nothing waits for the device, and a captured CUDA graph goes on
remembering.
"""

from fusedclip.policies.adagc import AdaGC
from fusedclip.policies.autoclip import AutoClip
from fusedclip.policies.policy import Policy
from fusedclip.policies.skipspikes import SkipSpikes
from fusedclip.policies.zclip import ZClip

__all__ = ["POLICIES", "AdaGC", "AutoClip", "Policy", "SkipSpikes", "ZClip"]

# By their names in configuration files.
POLICIES: dict[str, type[Policy]] = {
    kind.__name__.lower(): kind for kind in (AutoClip, ZClip, AdaGC, SkipSpikes)
}
