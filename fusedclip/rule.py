"""How to clip, as data: which gradients count towards which norm, and what a norm leads to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor


class Adaptive(Protocol):
    """A threshold that follows the norms: ``AutoClip``, ``ZClip``."""

    def threshold(self, norm: Tensor) -> Tensor:
        """The threshold for a step with this norm, a 0-dim fp64 tensor on the norm's device."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Threshold: TypeAlias = float | Tensor | Adaptive


@dataclass(frozen=True, eq=False)
class Segments:
    """The norm that each parameter counts towards."""

    of: Sequence[int] | None = None  # [len(parameters)], in [0, count); None: all are of 0
    count: int = 1


GLOBAL = Segments()


@dataclass(frozen=True, eq=False)
class Rule:
    """What a clip does with the gradients that it is given."""

    max_norm: Threshold  # one for all norms, or fp64 [segments.count] on the CPU
    norm_type: float = 2.0  # p of the p-norm
    nonfinite: str = "propagate"  # one of ``reference.NONFINITE``
    segments: Segments = GLOBAL
    process_group: Any = None  # also add up over its ranks
    strict: bool = True  # an empty tensor has an infinity norm of 0; else that is torch's error

    @property
    def infinity(self) -> bool:
        return self.norm_type == math.inf


def may_write(max_norm: float | Tensor, nonfinite: str, *, unscaled: bool) -> bool:
    """Whether a clip may change a gradient: under an infinite threshold few do.

    Args:
        unscaled: whether the values are multiplied by 1 / loss scale too.
    """
    return isinstance(max_norm, Tensor) or max_norm != math.inf or nonfinite == "zero" or unscaled
