"""Times on a GPU: fusedclip, torch and what else is installed, in turn, medians of many rounds.

Four cases: a clip below the threshold and one above it, and its two halves alone, measuring and
scaling. Every call gets another copy of the gradients, as many as exceed the L2 cache.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fusedclip
from fusedclip.backends import cuda, select
from fusedclip.gradients import gather

from .contestants import FACTOR, Contestant, gradients_of
from .gpu_clock import MIN_ROUNDS, Clock, Timing, Yardsticks, copies_of, medians
from .workloads import Workload

Call = Callable[[Sequence[nn.Parameter]], object]


@dataclass(frozen=True)
class Case:
    """What is called, and the fewest bytes that it has to move, in times those of the gradients."""

    name: str
    reads: int
    rewrites: int  # reads and writes

    def call(self, of: Contestant, norm: float) -> Call | None:
        """What ``of`` does in this case, for gradients of this norm; None: it has nothing."""
        if self.name == "measure":
            return of.measure
        if self.name == "scale":
            return of.scale
        max_norm = norm * (FACTOR if self.rewrites else 1 / FACTOR)
        return lambda parameters: of.clip(parameters, max_norm)


CASES = (
    Case("measure", 1, 0), Case("not clipped", 1, 0), Case("scale", 0, 1), Case("clipped", 1, 1),
)  # fmt: skip


@dataclass(frozen=True)
class GpuResult:
    """One workload in one case; the dictionaries are by contestant."""

    workload: str
    dtype: str
    tensors: int
    bytes: int
    case: str
    moved: int  # the fewest bytes that have to be moved
    floor: float  # seconds that they take at the yardsticks' bandwidth
    rounds: int
    layout: Mapping[str, int] | None  # of the CUDA backend's launch
    timings: dict[str, Timing]
    ratios: dict[str, float]  # how many times as fast as torch, wall time
    fractions: dict[str, float]  # the floor over the time on the device


def measure(
    workload: Workload,
    device: torch.device,
    seconds: float,
    yardsticks: Yardsticks,
    contestants: Mapping[str, Contestant],
) -> list[GpuResult]:
    """All cases, for about ``seconds`` together and at least 11 rounds each."""
    copies = copies_of(workload, device)
    norm = float(fusedclip.get_total_norm(gradients_of(copies[0])))
    layout = layout_of(copies[0])
    results = []
    for case in CASES:
        calls = {name: case.call(of, norm) for name, of in contestants.items()}
        present = {name: call for name, call in calls.items() if call is not None}
        if not present:
            continue
        timings, rounds = _timed(
            present, copies, norm if case.rewrites else None, Clock(device), seconds / len(CASES)
        )
        floor = yardsticks.floor(case.reads * workload.bytes, case.rewrites * workload.bytes)
        results.append(
            GpuResult(
                workload=workload.name,
                dtype=workload.dtype_name,
                tensors=len(copies[0]),
                bytes=workload.bytes,
                case=case.name,
                moved=(case.reads + 2 * case.rewrites) * workload.bytes,
                floor=floor,
                rounds=rounds,
                layout=layout,
                timings=timings,
                ratios={name: timings["torch"].wall / t.wall for name, t in timings.items()},
                fractions={name: floor / t.device for name, t in timings.items()},
            )
        )
    return results


def _timed(
    calls: Mapping[str, Call],
    copies: Sequence[list[nn.Parameter]],
    restored: float | None,
    clock: Clock,
    seconds: float,
) -> tuple[dict[str, Timing], int]:
    """Medians, and of how many rounds; ``restored``: the norm that each call is to find."""
    turn = 0

    def timed(call: Call, measure: Callable[[Callable[[], object]], Any]) -> Any:
        nonlocal turn
        turn += 1
        parameters = copies[turn % len(copies)]
        result = measure(lambda: call(parameters))
        if restored is not None:
            restore(parameters, restored)
        return result

    for call in calls.values():  # compiled, allocated and cached, every copy
        for _ in copies:
            timed(call, clock)
    times: dict[str, list[Timing]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        order = list(calls.items())
        for name, call in order if rounds % 2 else reversed(order):
            now: Timing = timed(call, clock)
            on_device = timed(call, functools.partial(clock.device_time, host_seconds=now.host))
            times[name].append(Timing(on_device, now.host, now.wall))
        rounds += 1
    return {name: medians(values) for name, values in times.items()}, rounds


def restore(parameters: Sequence[nn.Parameter], norm: float) -> None:
    grads = gradients_of(parameters)
    torch._foreach_mul_(grads, norm / fusedclip.get_total_norm(grads))


def layout_of(parameters: Sequence[nn.Parameter]) -> dict[str, int] | None:
    """How the CUDA backend lays these gradients out; None where another backend takes them."""
    part: Any = gather(list(parameters), select.resolve("auto")).sole
    if part is None or part.backend is not cuda:
        return None
    part.prepare(False, None, 1, False)
    names = ("threads", "blocks", "chunk_bytes", "resident_bytes", "launches")
    return dict(zip(names, part.layout(), strict=True))
