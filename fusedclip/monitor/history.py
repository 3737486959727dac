"""The last steps in ring buffers on the host, and of the whole run how many there were."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """The steps that are remembered, oldest first."""

    first: int  # the number of the oldest one
    norms: Tensor  # fp64 [steps], before clipping
    thresholds: Tensor  # fp64 [steps]; inf: nothing was to be clipped
    tensor_norms: Tensor | None  # fp64 [steps, tensors]; NaN rows where they are not known


class History:
    """A ring buffer of the last steps, with 8 bytes for each tensor of a step and 16 more.

    Args:
        window: how many steps are remembered.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.clear()

    def clear(self) -> None:
        # One place more than is remembered: next_row() hands out the place of the next step while
        # the oldest step is still one of those remembered.
        self._places = self.window + 1
        self._norms = array("d", [0.0]) * self._places
        self._thresholds = array("d", [0.0]) * self._places
        self._rows: Tensor | None = None  # [places, tensors]
        self._row_views: list[Tensor] = []
        self._rows_since = 0  # the first step with a row
        self.steps = 0
        self.nonfinite_steps = 0

    def next_row(self, count: int) -> Tensor:
        """Where the tensor norms of the next step may be written, fp64 ``[count]``."""
        if self._rows is None or self._rows.shape[1] != count:
            # The system gives memory to pages of zeros only once they are written.
            self._rows = torch.zeros(self._places, count, dtype=torch.float64, device="cpu")
            self._row_views = list(self._rows.unbind())
            self._rows_since = self.steps
        return self._row_views[self.steps % self._places]

    def append(self, norm: float, threshold: float, tensor_norms: Tensor | None) -> None:
        """Adds a step; ``tensor_norms`` is on the CPU, and may be what ``next_row()`` returned."""
        place = self.steps % self._places
        self._norms[place] = norm
        self._thresholds[place] = threshold
        if tensor_norms is not None:
            row = self.next_row(tensor_norms.numel())
            if row is not tensor_norms:
                row.copy_(tensor_norms)
        elif self._row_views:
            self._row_views[place].fill_(math.nan)
        self.nonfinite_steps += not math.isfinite(norm)
        self.steps += 1

    @property
    def last_norm(self) -> float | None:
        return self._norms[(self.steps - 1) % self._places] if self.steps else None

    def remembered(self) -> Steps:
        first = max(0, self.steps - self.window)
        places = torch.arange(first, self.steps, device="cpu") % self._places
        rows = None
        if self._rows is not None:
            rows = self._rows[places]
            rows[: max(0, self._rows_since - first)] = math.nan
        return Steps(
            first,
            torch.tensor(self._norms, dtype=torch.float64, device="cpu")[places],
            torch.tensor(self._thresholds, dtype=torch.float64, device="cpu")[places],
            rows,
        )

    def state_dict(self) -> dict[str, Any]:
        kept = self.remembered()
        return {
            "steps": self.steps,
            "nonfinite_steps": self.nonfinite_steps,
            "norms": kept.norms,
            "thresholds": kept.thresholds,
            "tensor_norms": kept.tensor_norms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the history that was saved; of a longer window the newest steps are kept."""
        self.clear()
        norms, thresholds = state["norms"].tolist(), state["thresholds"].tolist()
        rows = state["tensor_norms"]
        self.steps = state["steps"] - len(norms)
        for i, (norm, threshold) in enumerate(zip(norms, thresholds, strict=True)):
            self.append(norm, threshold, None if rows is None else rows[i])
        self.nonfinite_steps = state["nonfinite_steps"]
