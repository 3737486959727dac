"""The common clip as one native call: dense gradients of plain tensors, all on one device.

It gathers, measures, decides and scales. Other lists of gradients are recognised before anything
is written, and the pipeline clips them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, native
from fusedclip.rule import may_write

BACKENDS = {"auto": cpu, "cpu": cpu, "cuda": cuda}  # as users name them


def prepared(
    max_norm: float, *, from_parameters: bool, infinity: bool, nonfinite: str, backend: str
) -> Any:
    """The settings as the module takes them, for ``clip_``."""
    # As select.resolve() would for "auto", but that the module itself looks at the environment:
    # os.environ takes longer than all the rest.
    auto = backend == "auto"
    return native.module.PlainClip(
        max_norm,
        infinity,
        native.NONFINITE[nonfinite],
        from_parameters,
        auto or backend == "cpu",
        auto,
        cuda.plain_memory,
    )


def clip_(
    tensors: Sequence[Tensor], max_norm: float, *, nonfinite: str, backend: str, settings: Any
) -> Tensor | None:
    """The norm before clipping, 0-dim on the gradients' device.

    Args:
        settings: ``prepared`` with the same arguments.

    Returns:
        ``None``, and nothing was done, where the gradients are not plain; also where the norm is
        not finite and ``nonfinite`` is "error": the pipeline then finds the gradients that are to
        blame.
    """
    if backend != "auto" and BACKENDS[backend].problem():
        return None
    devices = 0 if backend == "cpu" else cuda.usable_devices()
    done: Any = settings(tensors, devices, torch.get_num_threads())
    if isinstance(done, tuple):
        norm, written = done
        # On a GPU these are all gradients, for the host does not know whether any was written.
        if may_write(max_norm, nonfinite, unscaled=False):
            native.bump_versions_unless_refused(written, norm, nonfinite)
    else:
        norm = done
    if nonfinite == "error" and norm is not None and not bool(norm.isfinite()):
        return None
    return norm  # type: ignore[no-any-return]
