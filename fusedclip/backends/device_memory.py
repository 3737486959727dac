"""The memory that GPU kernels are handed: scratch, and a table of the gradients.

Both are kept for each stream: launches of one stream come one after the other, so they can share.
A larger scratch or another table is new memory, so what a launch uses is never overwritten. A
launch that is captured into a CUDA graph gets memory of its own, since other launches may have
written to the stream's when the graph is replayed.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class DeviceMemory:
    """The memory of one backend.

    Args:
        zeroed: whether scratch has to be zeros when it is new.
    """

    def __init__(self, *, zeroed: bool = False) -> None:
        self._new = torch.zeros if zeroed else torch.empty
        self._scratch: dict[tuple[torch.device, int], Tensor] = {}
        self._table: dict[tuple[torch.device, int], tuple[Hashable, Tensor]] = {}
        self._captured: list[Hashable] = []

    def scratch(self, device: torch.device, stream: int, size: int) -> Tensor:
        """At least ``size`` bytes for the current stream, whose handle is ``stream``."""
        captured = capturing(device)
        known = None if captured else self._scratch.get((device, stream))
        if known is not None and known.numel() >= size:
            return known
        scratch = self._new(size, dtype=torch.uint8, device=device)
        if not captured:
            self._scratch[device, stream] = scratch
        return scratch

    def table(
        self, device: torch.device, stream: int, key: Hashable, write: Callable[[], Tensor]
    ) -> Tensor:
        """The table that ``write()`` makes on the device: made anew when ``key`` has changed.

        ``key`` must keep alive the host memory that ``write`` copies from.
        """
        if capturing(device):
            self._captured.append(key)  # every replay copies from it
            return write()
        known = self._table.get((device, stream))
        if known is not None and known[0] == key:
            return known[1]
        table = write()
        self._table[device, stream] = (key, table)
        return table


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured (torch without CUDA has no answer but an error)."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    return device.type == "xpu" and torch.xpu.is_current_stream_capturing()
