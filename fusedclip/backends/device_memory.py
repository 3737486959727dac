"""The memory that GPU kernels are handed: scratch, and a table of the gradients.

Both are kept for each stream: launches of one stream come one after the other, so they can share.
A larger scratch or another table is new memory, so what a launch uses is never overwritten. A
launch that is captured into a CUDA graph gets memory of its own, since other launches may have
written to the stream's when the graph is replayed.

What is kept must not lie in a pool that somebody else has opened for the present thread, as
torch.compile's CUDA graphs do while they warm up: they take their pool for empty afterwards.
"""

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class DeviceMemory:
    """The memory of one backend.

    Args:
        zeroed: whether scratch has to be zeros when it is new.
        copied: whether tables are copied from host memory, which their keys keep alive; else they
            are written by launches that carry them.
    """

    def __init__(self, *, zeroed: bool = False, copied: bool = False) -> None:
        self._new = torch.zeros if zeroed else torch.empty
        self._copied = copied
        self._scratch: dict[tuple[torch.device, int], Tensor] = {}
        self._table: dict[tuple[torch.device, int], tuple[Hashable, Tensor]] = {}
        self._replayed: set[Hashable] = set()

    def scratch(self, device: torch.device, stream: int, size: int) -> Tensor:
        """At least ``size`` bytes for the current stream, whose handle is ``stream``."""

        def make() -> Tensor:
            return self._new(size, dtype=torch.uint8, device=device)

        if capturing(device):
            return make()
        known = self._scratch.get((device, stream))
        if known is not None and known.numel() >= size:
            return known
        scratch = self._scratch[device, stream] = outside_pools(device, make)
        return scratch

    def table(
        self,
        device: torch.device,
        stream: int,
        key: Hashable,
        make: Callable[[], Tensor],
        write: Callable[[Tensor], None],
    ) -> Tensor:
        """The memory that ``make()`` allocates and ``write`` fills: anew when ``key`` has changed.

        ``make`` must not launch anything, ``write`` does so on the current stream.
        """
        if capturing(device):
            if self._copied:
                self._replayed.add(key)  # every replay copies from it, however long the graph lives
            table = make()
            write(table)
            return table
        known = self._table.get((device, stream))
        if known is not None and known[0] == key:
            return known[1]
        table = outside_pools(device, make)
        write(table)
        self._table[device, stream] = (key, table)
        return table


def outside_pools(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` allocates, in the common pool of ``device``, for use on the current stream.

    A pool is opened for a thread or for its stream, so another thread allocates, on the default
    stream; what it may launch there, to zero the memory, is done before what comes next on the
    current one. Takes 0.1 ms, once for each stream and size.
    """
    if device.type != "cuda":
        return make()
    made: list[Tensor] = []
    failures: list[BaseException] = []

    def allocate() -> None:
        try:
            made.append(make())
        except BaseException as error:  # out of memory: the caller's to see
            failures.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    stream = torch.cuda.current_stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    made[0].record_stream(stream)
    return made[0]


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured (torch without CUDA has no answer but an error)."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    return device.type == "xpu" and torch.xpu.is_current_stream_capturing()
