"""The common clip as one native call: dense gradients of plain tensors, all on one device.

It gathers, measures, decides and scales. Other lists of gradients are recognised before anything
is written, and the pipeline clips them.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from fusedclip.backends import cpu, cuda, native

# Of a list: the norm, or the norm and what was written, or None.
PlainClip: TypeAlias = Callable[[Sequence[Tensor]], Tensor | tuple[Tensor, list[Tensor]] | None]

BACKENDS = {"auto": cpu, "cpu": cpu, "cuda": cuda}  # as users name them


def prepared(
    max_norm: float, *, from_parameters: bool, infinity: bool, nonfinite: str, backend: str
) -> PlainClip:
    """The native function of these settings, for ``clip_``.

    It asks itself what ``ambient.plain_allowed`` and ``select.resolve`` would answer: on cold
    caches that much Python takes as long as the clip.
    """
    auto = backend == "auto"
    return native.module.plain_clip(
        max_norm,
        infinity,
        native.NONFINITE[nonfinite],
        from_parameters,
        auto or backend == "cpu",
        None if auto else lambda: str(BACKENDS[backend].problem()),
        cuda.usable_devices,
        cuda.plain_memory,
    )


def clip_(clip: PlainClip, tensors: Sequence[Tensor]) -> Tensor | None:
    """The norm before clipping, 0-dim on the gradients' device.

    Returns:
        ``None``, and nothing was written, where gradients are not plain or torch has to see every
        operation; also where the norm is not finite and ``nonfinite`` is "error": the pipeline
        then finds the gradients that are to blame.
    """
    done = clip(tensors)
    if not isinstance(done, tuple):
        return done
    norm, written = done  # on a GPU all of them: the host does not know whether any was written
    native.bump_versions(written)
    return norm
