"""How to clip, as data: which gradients count towards which norm, and what a norm leads to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor


class Adaptive(Protocol):
    """A threshold that follows the norms: ``AutoClip``, ``ZClip``.

    A ``Policy`` may do more, see there; of any other object this is all that is asked.
    """

    def threshold(self, norm: Tensor) -> Tensor:
        """The threshold for a step with this norm: fp64 on the norm's device.

        Both are 0-dim for the global norm, else ``[segments]``.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Threshold: TypeAlias = float | Tensor | Adaptive


@dataclass(eq=False, repr=False)
class Decision:
    """What becomes of a step whose norms are known; all of it on the norms' device."""

    coefficients: Tensor  # fp64 [segments], what the gradients of each are multiplied by
    thresholds: float | Tensor  # what the norms were compared with, one for all or fp64 [segments]
    skip: Tensor | None = None  # bool, 0-dim: leave the step out


@dataclass(frozen=True, eq=False, repr=False)
class Segments:
    """The norm that each parameter counts towards."""

    of: Sequence[int] | None = None  # [len(parameters)], in [0, count); None: all are of 0
    count: int = 1


GLOBAL = Segments()


# Without what is not used of a dataclass, here and elsewhere: Python compiles each method of each
# at import.
@dataclass(frozen=True, eq=False, repr=False)
class Rule:
    """What a clip does with the gradients that it is given."""

    max_norm: Threshold  # one for all norms, or fp64 [segments.count] on the CPU
    norm_type: float = 2.0  # p of the p-norm
    nonfinite: str = "propagate"  # one of ``reference.NONFINITE``
    segments: Segments = GLOBAL
    process_group: Any = None  # also add up over its ranks
    strict: bool = True  # an empty tensor has an infinity norm of 0; else that is torch's error
    skip_above: Threshold | None = None  # leave the step out if its norm is larger, or says so

    @property
    def by_segment(self) -> bool:
        """Whether there is a vector of norms; the global norm is a scalar."""
        return self.segments is not GLOBAL

    @property
    def may_skip(self) -> bool:
        """Whether a step may have to be left out, which is for the optimizer to do."""
        return self.skip_above is not None or bool(getattr(self.max_norm, "may_skip", False))

    @property
    def infinity(self) -> bool:
        return self.norm_type == math.inf


def may_write(max_norm: float | Tensor, nonfinite: str, *, unscaled: bool) -> bool:
    """Whether a clip may change a gradient: under an infinite threshold few do.

    Args:
        unscaled: whether the values are multiplied by 1 / loss scale too.
    """
    return isinstance(max_norm, Tensor) or max_norm != math.inf or nonfinite == "zero" or unscaled
