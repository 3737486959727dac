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
    # Where a clip has several norms, those above are of the one that was most above its threshold.
    segment_norms: Tensor | None  # fp64 [steps, segments]; NaN rows as above
    segment_thresholds: Tensor | None  # fp64 [steps, segments]
    skipped: Tensor  # bool [steps], left out


class History:
    """A ring buffer of the last steps, with 8 bytes for each tensor of a step, 16 for each norm.

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
        self._skipped = bytearray(self._places)
        self._segments: Tensor | None = None  # [places, 2, segments]: norms and thresholds
        self._rows: Tensor | None = None  # [places, tensors]
        self._row_views: list[Tensor] = []
        self._rows_since = 0  # the first step with a row
        self.steps = 0
        self.nonfinite_steps = 0
        self.skipped_steps = 0

    def next_row(self, count: int) -> Tensor:
        """Where the tensor norms of the next step may be written, fp64 ``[count]``."""
        if self._rows is None or self._rows.shape[1] != count:
            # The system gives memory to pages of zeros only once they are written.
            self._rows = torch.zeros(self._places, count, dtype=torch.float64, device="cpu")
            self._row_views = list(self._rows.unbind())
            self._rows_since = self.steps
        return self._row_views[self.steps % self._places]

    def append(
        self,
        norm: float | Tensor,
        threshold: float | Tensor,
        tensor_norms: Tensor | None,
        skipped: bool = False,
    ) -> None:
        """Adds a step; tensors are on the CPU.

        Args:
            norm, threshold: one number each, or ``[segments]``.
            tensor_norms: may be what ``next_row()`` returned.
        """
        place = self.steps % self._places
        if isinstance(norm, Tensor) and norm.numel() > 1:
            norm, threshold = self._append_segments(place, norm, threshold)
        elif self._segments is not None:
            self._segments[place] = math.nan
        self._norms[place] = norm = float(norm)
        self._thresholds[place] = float(threshold)
        self._skipped[place] = skipped
        if tensor_norms is not None:
            row = self.next_row(tensor_norms.numel())
            if row is not tensor_norms:
                row.copy_(tensor_norms)
        elif self._row_views:
            self._row_views[place].fill_(math.nan)
        self.nonfinite_steps += not math.isfinite(norm)
        self.skipped_steps += skipped
        self.steps += 1

    def _append_segments(
        self, place: int, norms: Tensor, thresholds: float | Tensor
    ) -> tuple[float, float]:
        """Norm and threshold of the segment that was most above, or nearest to, its own."""
        if self._segments is None or self._segments.shape[2] != norms.numel():
            shape = (self._places, 2, norms.numel())
            self._segments = torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
        row = self._segments[place]
        row[0].copy_(norms)
        row[1].copy_(torch.as_tensor(thresholds))
        ratios = torch.where(row[0] == 0.0, 0.0, row[0] / row[1]).nan_to_num(math.inf)
        worst = int((ratios if bool(ratios.any()) else row[0]).argmax())
        return row[0, worst].item(), row[1, worst].item()

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
        segments = None if self._segments is None else self._segments[places]
        return Steps(
            first,
            torch.tensor(self._norms, dtype=torch.float64, device="cpu")[places],
            torch.tensor(self._thresholds, dtype=torch.float64, device="cpu")[places],
            rows,
            None if segments is None else segments[:, 0],
            None if segments is None else segments[:, 1],
            torch.tensor(list(self._skipped), dtype=torch.bool, device="cpu")[places],
        )

    def state_dict(self) -> dict[str, Any]:
        kept = self.remembered()
        return {
            "steps": self.steps,
            "nonfinite_steps": self.nonfinite_steps,
            "skipped_steps": self.skipped_steps,
            "norms": kept.norms,
            "thresholds": kept.thresholds,
            "tensor_norms": kept.tensor_norms,
            "segment_norms": kept.segment_norms,
            "segment_thresholds": kept.segment_thresholds,
            "skipped": kept.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the history that was saved; of a longer window the newest steps are kept."""
        self.clear()
        count = len(state["norms"])
        rows, skipped = state["tensor_norms"], state.get("skipped")
        norms, thresholds = state["norms"], state["thresholds"]
        segments, limits = state.get("segment_norms"), state.get("segment_thresholds")
        self.steps = state["steps"] - count
        for i in range(count):
            norm, limit = norms[i].item(), thresholds[i].item()
            if segments is not None and limits is not None and not segments[i].isnan().all():
                norm, limit = segments[i], limits[i]
            left_out = skipped is not None and bool(skipped[i])
            self.append(norm, limit, None if rows is None else rows[i], left_out)
        self.nonfinite_steps = state["nonfinite_steps"]
        self.skipped_steps = state.get("skipped_steps", 0)
