"""Numbers on their way from the device to the host, in order, while nobody waits for them."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class Readback:
    """A queue of vectors: each is copied to pinned memory behind the work that makes it.

    ``push`` never waits. How many are under way is as far as the host runs ahead of the device;
    their memory is reused.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, torch.Event | None]] = deque()
        self._free: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def push(self, values: Tensor) -> None:
        """Takes a vector on any device; it may be freed or overwritten on its stream after that."""
        if on_host(values):
            self._under_way.append((values.clone(), None))
            return
        free = self._free.get(values.numel())
        host = free.pop() if free else _pinned(values.numel())
        self._under_way.append((host, _start_copy(values, host)))

    def arrived(self, *, wait: bool = False) -> Iterator[Tensor]:
        """Those that have arrived, oldest first, each good until the next is asked for.

        Args:
            wait: until all have.
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
                # Of another length than the last one: the list of parameters has changed.
                if host.numel() not in self._free:
                    self._free = {host.numel(): []}
                self._free[host.numel()].append(host)


def on_host(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _start_copy(values: Tensor, host: Tensor) -> torch.Event:
    """Copies behind what the device has been told to do; the event says when it is done."""
    with torch.accelerator.device_index(values.device.index):
        host.copy_(values, non_blocking=True)
        event = torch.Event(values.device.type)
        event.record()
    return event


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device="cpu", pin_memory=True)
