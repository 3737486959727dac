"""The common clip as one native call: dense gradients of plain tensors, all on one device.

gather, measure, decide and scale happen in it. Anything else is told apart before anything is
touched, and left to the pipeline.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, native
from fusedclip.backends.select import Choice
from fusedclip.rule import may_write


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

    ``None``, and nothing was done, where the gradients are not plain; also where a norm that is not
    finite is an error, whose cause is found the long way.
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
    # On a GPU these are all gradients, for the host does not know whether any was written.
    if written is not None and may_write(max_norm, nonfinite, unscaled=False):
        native.bump_versions(written)
    return norm
