"""Times on a GPU: fusedclip, torch and whatever else is installed, in turn, medians of many rounds.

*Device* time is between two events, behind a kernel that keeps the GPU busy until the host has
queued the whole call: what the kernels take. *Host* time is until the call returns, *wall* time
until the GPU is idle again, both from an idle GPU. Every call gets another copy of the gradients,
as many as exceed the L2 cache. The yardstick is a copy's bandwidth, measured in the same run.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fusedclip

from .contestants import Clip, gradients_of
from .workloads import Workload

_MIN_ROUNDS = 11
_MAX_COPIES = 64
_COPY_BYTES = 2 << 30


@dataclass(frozen=True)
class Timing:
    """Median seconds a call."""

    device: float
    host: float
    wall: float


@dataclass(frozen=True)
class GpuResult:
    workload: str
    dtype: str
    tensors: int
    bytes: int
    clipped: bool
    moved: int  # the fewest bytes that have to be moved: N read, or N read and N read and written
    copy_bandwidth: float  # bytes/s, read and written
    rounds: int
    timings: dict[str, Timing]  # by contestant; "fusedclip" and "torch" are always there

    @property
    def ratio(self) -> float:
        """How many times as fast as torch, wall time."""
        return self.timings["torch"].wall / self.timings["fusedclip"].wall

    def fraction(self, name: str) -> float:
        """Of the copy's bandwidth, if no more is moved than has to be."""
        return self.moved / self.timings[name].device / self.copy_bandwidth


class Clock:
    """Times one call. On a CPU all three times are the same: that is for the tests."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, call: Callable[[], object]) -> Timing:
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


def copy_bandwidth(device: torch.device, size: int = _COPY_BYTES) -> float:
    """Bytes/s that a device-to-device copy reads and writes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    times = [clock.device_time(lambda: target.copy_(source), 50e-6) for _ in range(_MIN_ROUNDS)]
    return 2 * source.nbytes / statistics.median(times)


def measure(
    workload: Workload,
    device: torch.device,
    seconds: float,
    bandwidth: float,
    clips: dict[str, Clip],
) -> list[GpuResult]:
    """Not clipped and clipped, for about ``seconds`` in all and at least 11 rounds each."""
    copies = [workload.parameters(device) for _ in range(_num_copies(workload, device))]
    norm = float(fusedclip.get_total_norm(gradients_of(copies[0])))
    return [
        _measure_case(workload, copies, norm, clipped, device, seconds / 2, bandwidth, clips)
        for clipped in (False, True)
    ]


def _measure_case(
    workload: Workload,
    copies: list[list[nn.Parameter]],
    norm: float,
    clipped: bool,
    device: torch.device,
    seconds: float,
    bandwidth: float,
    clips: dict[str, Clip],
) -> GpuResult:
    max_norm = 0.5 * norm if clipped else 2 * norm
    clock = Clock(device)
    turn = 0

    def timed(clip: Clip, measure: Callable[[Callable[[], object]], Any]) -> Any:
        nonlocal turn
        turn += 1
        parameters = copies[turn % len(copies)]
        result = measure(lambda: clip(parameters, max_norm))
        if clipped:
            grads = gradients_of(parameters)
            torch._foreach_mul_(grads, norm / fusedclip.get_total_norm(grads))
        return result

    for clip in clips.values():  # compiled, allocated and cached, every copy
        for _ in copies:
            timed(clip, clock)
    times: dict[str, list[Timing]] = {name: [] for name in clips}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or time.perf_counter() < end:
        order = list(clips.items())
        for name, clip in order if rounds % 2 else reversed(order):
            now: Timing = timed(clip, clock)
            on_device = timed(clip, functools.partial(clock.device_time, host_seconds=now.host))
            times[name].append(Timing(on_device, now.host, now.wall))
        rounds += 1
    return GpuResult(
        workload=workload.name,
        dtype=workload.dtype_name,
        tensors=len(copies[0]),
        bytes=workload.bytes,
        clipped=clipped,
        moved=(3 if clipped else 1) * workload.bytes,
        copy_bandwidth=bandwidth,
        rounds=rounds,
        timings={name: _medians(values) for name, values in times.items()},
    )


def _medians(values: Sequence[Timing]) -> Timing:
    def median(field: Iterable[float]) -> float:
        return statistics.median(field)

    return Timing(
        median(v.device for v in values),
        median(v.host for v in values),
        median(v.wall for v in values),
    )


def _num_copies(workload: Workload, device: torch.device) -> int:
    """So many that a call never finds its gradients in the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_COPIES, max(1, math.ceil(3 * cache / workload.bytes)))
