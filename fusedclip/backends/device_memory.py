"""The memory that GPU kernels are handed: scratch, and a table of the gradients.

Both are kept for each stream: launches of one stream come one after the other, so they can share.
A launch that is captured into a CUDA graph gets its own, since a replay may find anything else in
the stream's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StreamMemory:
    """What the kernels of one stream, or of one captured launch, are handed."""

    scratch: Tensor  # uint8, zeros when it is new
    table: Tensor | None = None
    host_table: Tensor | None = None  # what the table was copied from


class DeviceMemory:
    """The memory of one backend."""

    def __init__(self) -> None:
        self._of_streams: dict[tuple[torch.device, int], StreamMemory] = {}
        self._captured: list[Tensor] = []  # host tables that graphs copy from at every replay

    def of_stream(self, device: torch.device, stream: int, scratch_bytes: int) -> StreamMemory:
        """That of the current stream, whose handle is ``stream``; its own for a graph."""
        if _capturing(device):
            return StreamMemory(_zeros(scratch_bytes, device))
        memory = self._of_streams.get((device, stream))
        if memory is None:
            memory = self._of_streams[device, stream] = StreamMemory(_zeros(0, device))
        if memory.scratch.numel() < scratch_bytes:
            memory.scratch = _zeros(scratch_bytes, device)
        return memory

    def put_table(self, memory: StreamMemory, host: Tensor) -> Tensor:
        """``host`` on the device; copied, without waiting, only when it has changed."""
        known = memory.host_table
        if memory.table is None or known is None or not (known is host or torch.equal(known, host)):
            memory.table = host.to(memory.scratch.device, non_blocking=True, copy=True)
            memory.host_table = host
            if _capturing(memory.scratch.device):
                self._captured.append(host)
        return memory.table


def _capturing(device: torch.device) -> bool:
    """Whether a graph is being captured (torch without CUDA has no answer but an error)."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    return device.type == "xpu" and torch.xpu.is_current_stream_capturing()


def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)
