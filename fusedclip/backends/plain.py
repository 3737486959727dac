"""The common clip as one native call: dense gradients of plain tensors, all on one device.

It gathers, measures, decides and scales. Other lists of gradients are recognised before anything
is written, and the pipeline clips them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, native
from fusedclip.backends.select import Choice


def clip_(
    tensors: Sequence[Tensor],
    max_norm: float,
    *,
    from_parameters: bool,
    infinity: bool,
    nonfinite: str,
    choice: Choice,
) -> Tensor | None:
    """The norm before clipping, 0-dim on the gradients' device.

    ``None``, and nothing was done, where the gradients are not plain; also where the norm is not
    finite and ``nonfinite`` is "error": the pipeline then finds the gradients that are to blame.
    """
    done = native.module.plain_clip_(
        tensors, from_parameters, choice.take_cpu, choice.cuda_devices, max_norm, infinity,
        native.NONFINITE[nonfinite], torch.get_num_threads(), cuda.plain_memory,
    )  # fmt: skip
    if done is None:
        return None
    value, written, float64 = done
    norm: Tensor = value if isinstance(value, Tensor) else cpu.scalar(value, float64)
    if nonfinite == "error" and not bool(norm.isfinite()):
        return None
    if written is not None:
        native.bump_versions(written)
    return norm
