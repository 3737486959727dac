"""Copies numbers from the device to the host, in order, without making the host wait."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class Readback:
    """A queue of vectors: each is copied to pinned memory after the work that makes it.

    ``push`` never waits, so there are as many copies under way as steps that the host is ahead of
    the device. The memory of a copy that was read is used again.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, torch.Event | None]] = deque()
        self._free: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def push(self, values: Tensor) -> None:
        """Copies a vector; after that it may be freed, or overwritten on its stream."""
        if on_host(values):
            self._under_way.append((values.clone(), None))
            return
        free = self._free.get(values.numel())
        host = free.pop() if free else _pinned(values.numel())
        self._under_way.append((host, _start_copy(values, host)))

    def arrived(self, *, wait: bool = False) -> Iterator[Tensor]:
        """The vectors that have arrived, oldest first. Each is valid until the next is asked for.

        Args:
            wait: wait until all have arrived.
        """
        while self._under_way:
            host, event = self._under_way[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._under_way.popleft()
            yield host
            if event is not None:
                # Memory of another length is dropped: the list of parameters has changed.
                if host.numel() not in self._free:
                    self._free = {host.numel(): []}
                self._free[host.numel()].append(host)


def on_host(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _start_copy(values: Tensor, host: Tensor) -> torch.Event:
    """Copies after the work that is queued on the device; the event says when it is done."""
    with torch.accelerator.device_index(values.device.index):
        host.copy_(values, non_blocking=True)
        event = torch.Event(values.device.type)
        event.record()
    return event


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device="cpu", pin_memory=True)
