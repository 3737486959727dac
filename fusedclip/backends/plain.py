"""The common clip as one native call: dense gradients of plain tensors, all on one device.

gather, measure, decide and scale happen in it. Anything else is told apart before anything is
touched, and left to the pipeline.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends import cpu, cuda, native
from fusedclip.rule import may_write


BACKENDS = ("auto", "cpu", "cuda")  # as users name them


def problem() -> str:
    """Why there is no such call here; empty when there is."""
    return cpu.problem()


def clip_(
    tensors: Sequence[Tensor],
    max_norm: float,
    *,
    from_parameters: bool,
    infinity: bool,
    nonfinite: str,
    backend: str,
) -> Tensor | None:
    """The norm before clipping, 0-dim on the gradients' device.

    ``None``, and nothing was done, where the gradients are not plain; also where a norm that is not
    finite is an error, whose cause is found the long way.
    """
    # As select.resolve() would for "auto", but that the module itself looks at the environment:
    # os.environ takes longer than all the rest.
    auto = backend == "auto"
    done: Any = native.module.plain_clip_(
        tensors,
        from_parameters,
        auto or backend == "cpu",
        cuda.usable_devices() if auto or backend == "cuda" else 0,
        max_norm,
        infinity,
        native.NONFINITE[nonfinite],
        torch.get_num_threads(),
        auto,
        cuda.plain_memory,
    )
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
