"""Times, taken side by side: torch and fusedclip in turn, medians of many rounds.

The floor is what the memory allows: one read of as many bytes (``flat.sum()``) when nothing is
clipped, one read and one read-and-write (``flat.sum()`` and ``flat.mul_()``) when it is.
"""

import ctypes
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fusedclip

from .contestants import serving
from .workloads import Workload, equal

_MIN_ROUNDS = 11
_MAX_ROUNDS = 500


Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One question, answered by torch and by fusedclip: median seconds a call."""

    torch: float
    fusedclip: float
    floor: float  # what the memory allows
    moved: int  # the fewest bytes that have to be moved
    rounds: int

    @property
    def ratio(self) -> float:
        return self.torch / self.fusedclip

    @property
    def over_floor(self) -> float:
        return self.fusedclip / self.floor

    @property
    def bandwidth(self) -> float:
        """Bytes/s that fusedclip achieves."""
        return self.moved / self.fusedclip


@dataclass(frozen=True)
class Result:
    workload: str
    dtype: str
    tensors: int
    elements: int
    bytes: int
    norm_only: Case  # get_total_norm
    unclipped: Case  # the norm is half the threshold
    clipped: Case  # the norm is twice the threshold


@dataclass(frozen=True)
class HostCost:
    """A call on n tensors of 16 elements takes fixed + n · per_tensor seconds (least squares)."""

    fixed: float
    per_tensor: float


@dataclass(frozen=True)
class Environment:
    device: str
    threads: int
    torch: str
    fusedclip: str
    backend: str
    python: str
    date: str
    load: float  # the average of the last minute, before anything was measured


def environment(device: torch.device) -> Environment:
    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        fusedclip=fusedclip.__version__,
        backend=serving(device),
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        load=os.getloadavg()[0],
    )


def measure(workload: Workload, device: torch.device, seconds: float) -> Result:
    """All cases of one workload, for about ``seconds`` and at least 11 rounds."""
    parameters = workload.parameters(device)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.randn(workload.elements, device=device).to(workload.dtypes[0])
    norm = float(fusedclip.get_total_norm(grads))
    loose, tight = 2 * norm, 0.5 * norm

    torch_clip = nn.utils.clip_grad_norm_
    share = seconds / 4  # for each of the four comparisons

    def compare(
        theirs: Call, ours: Call, floor: float, passes: int, restore: Call = lambda: None
    ) -> Case:
        seconds, rounds = side_by_side((theirs, ours), restore, device, share)
        return Case(*seconds, floor=floor, moved=passes * workload.bytes, rounds=rounds)

    (read, write), _ = side_by_side(
        (flat.sum, lambda: flat.mul_(0.9999)), lambda: None, device, share
    )
    return Result(
        workload=workload.name,
        dtype=workload.dtype_name,
        tensors=len(grads),
        elements=workload.elements,
        bytes=workload.bytes,
        norm_only=compare(
            lambda: nn.utils.get_total_norm(grads),
            lambda: fusedclip.get_total_norm(grads),
            floor=read,
            passes=1,
        ),
        unclipped=compare(
            lambda: torch_clip(parameters, loose),
            lambda: fusedclip.clip_(parameters, loose),
            floor=read,
            passes=1,
        ),
        clipped=compare(
            lambda: torch_clip(parameters, tight),
            lambda: fusedclip.clip_(parameters, tight),
            floor=read + write,
            passes=3,
            restore=lambda: torch._foreach_mul_(grads, 2.0),
        ),
    )


def side_by_side(
    calls: tuple[Call, Call], restore: Call, device: torch.device, seconds: float
) -> tuple[tuple[float, float], int]:
    """The medians of two calls made in turn, ``restore`` untimed after each; and the rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() < end):
        order = list(zip(calls, times, strict=True))
        # Every other round backwards, so that nobody is always the one after the other.
        for call, values in order if rounds % 2 else reversed(order):
            values.append(_time(call, device))
            restore()
        rounds += 1
    return (statistics.median(times[0]), statistics.median(times[1])), rounds


def host_cost(clip: Callable[[Sequence[nn.Parameter], float], Tensor], rounds: int) -> HostCost:
    counts = [1, 50, 100, 200, 400, 700, 1000]
    cpu = torch.device("cpu")
    lists = [equal(count, 16).parameters(cpu) for count in counts]
    times: list[list[float]] = [[] for _ in counts]
    for _ in range(rounds):
        for parameters, values in zip(lists, times, strict=True):
            clip(parameters, 1e9)  # the caches as a training loop over one model leaves them
            values.append(_time(functools.partial(clip, parameters, 1e9), cpu))
    medians = [statistics.median(values) for values in times]
    per_tensor, fixed = np.polyfit(counts, medians, 1)
    return HostCost(float(fixed), float(per_tensor))


def peak_extra_bytes(call: Call) -> int | None:
    """By how much the process's resident memory rose at most while ``call`` ran (Linux only)."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # What was freed and is still resident would hide what the call takes: glibc gives it back.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    clear.write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _time(call: Call, device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
