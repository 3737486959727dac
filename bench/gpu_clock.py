"""Times of a call on a GPU, and the bandwidths that they are held against.

*Device* time is between two events, behind a kernel that keeps the GPU busy until the host has
queued the whole call: what the kernels take. *Host* time is until the call returns, *wall* time
until the GPU is idle again, both from an idle GPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .workloads import Workload

MIN_ROUNDS = 11
_MAX_COPIES = 64
_YARDSTICK_BYTES = 2 << 30


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    device: float
    host: float
    wall: float


@dataclass(frozen=True)
class Yardsticks:
    """Bytes/s of torch's own kernels, measured in the same run."""

    read: float  # the sum of one flat tensor: the ceiling of a call that only reads
    copy: float  # one flat tensor onto another: read and written

    def floor(self, read: int, rewritten: int) -> float:
        """Seconds that reading and, after it, reading and writing so many bytes take at least."""
        return read / self.read + 2 * rewritten / self.copy


class Clock:
    """Times one call. On a CPU all three times are the same: that is for the tests."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Host and wall time."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            return Timing(seconds, seconds, seconds)
        torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        torch.cuda.synchronize(self._device)
        return Timing(math.nan, host, time.perf_counter() - begin)

    def device_time(self, call: Callable[[], object], host_seconds: float) -> float:
        if self._device.type != "cuda":
            return self(call).device
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        # 2 GHz at most; half as long again as the host needs to queue the call.
        torch.cuda._sleep(int(2e9 * (1.5 * host_seconds + 50e-6)))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self._device)
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def yardsticks(device: torch.device, size: int = _YARDSTICK_BYTES) -> Yardsticks:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)

    def seconds(call: Callable[[], object]) -> float:
        call()  # its kernel is loaded
        return statistics.median(clock.device_time(call, 50e-6) for _ in range(MIN_ROUNDS))

    read, copy = seconds(source.sum), seconds(lambda: target.copy_(source))
    return Yardsticks(read=source.nbytes / read, copy=2 * source.nbytes / copy)


def copies_of(workload: Workload, device: torch.device) -> list[list[nn.Parameter]]:
    """So many that calls in turn never find their gradients in the L2 cache."""
    number = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        number = min(_MAX_COPIES, max(1, math.ceil(3 * cache / workload.bytes)))
    return [workload.parameters(device) for _ in range(number)]


def medians(values: Sequence[Timing]) -> Timing:
    return Timing(
        statistics.median(v.device for v in values),
        statistics.median(v.host for v in values),
        statistics.median(v.wall for v in values),
    )
