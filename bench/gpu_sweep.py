"""The CUDA backend's launch, tried in other layouts: ``python -m bench.gpu_sweep --json PATH``.

One process, FUSEDCLIP_CUDA_LAYOUT set anew for each: one and two blocks a multiprocessor, on seven
of eight and on all, chunks of 4, 16 and 64 KiB a warp, in one launch with as much kept in shared
memory as fits and with nothing kept, and in a launch for each phase. Each layout takes turns with
that of launch_shape.h; a row is written as soon as it is there.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import fusedclip

from . import gpu_run, section, workloads
from .contestants import FACTOR, gradients_of
from .gpu import layout_of, restore
from .gpu_clock import MIN_ROUNDS, Clock, copies_of, yardsticks
from .gpu_device import Gpu, clocks, tensors_of
from .json_file import write_whole
from .workloads import Workload

_VARIABLE = "FUSEDCLIP_CUDA_LAYOUT"
_THREADS = 256
_CHUNKS_KIB = (4, 16, 64)
# What a block cannot keep chunks in: 1 KiB is the system's, and its totals take less than another.
_SPARE_KIB = 2
_TILES_KIB = 32  # of a block: launch_shape.h keeps whole ones

# One whose second visit is on chip, one of 100 MB, two long ones.
WORKLOADS = [
    w for w in workloads.GPU_WORKLOADS
    if w.name in ("1,000 × 1,024", "ResNet-50", "500 matrices", "1 × 1,536,066,816")
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    blocks_each: int  # of a multiprocessor
    blocks: int
    chunk_kib: int
    resident_kib: int  # of a block
    launches: int

    @property
    def text(self) -> str:
        """As FUSEDCLIP_CUDA_LAYOUT has it."""
        kept = self.resident_kib << 10
        return f"{_THREADS},{self.blocks},{self.chunk_kib << 10},{kept},{self.launches}"

    def leaves_room(self, gpu: Gpu) -> bool:
        """Whether launch_shape.h may take it: see there, on communication kernels."""
        if self.launches > 1:  # ordinary ones wait for nobody
            return self.blocks <= self.blocks_each * _seven_eighths(gpu)
        kept = self.resident_kib <= gpu.shared_kib // 2 - _SPARE_KIB
        return self.blocks <= _seven_eighths(gpu) and kept


def layouts(gpu: Gpu) -> list[Layout]:
    made = []
    for each in (1, 2):
        # Of a multiprocessor: half of it, as launch_shape.h, and all that the blocks can have.
        shares = sorted({gpu.shared_kib // 2, gpu.shared_kib // each})
        fitting = {max(0, share - _SPARE_KIB) // _TILES_KIB * _TILES_KIB for share in shares}
        for multiprocessors in (_seven_eighths(gpu), gpu.multiprocessors):
            for chunk in _CHUNKS_KIB:
                blocks = each * multiprocessors
                made += [Layout(each, blocks, chunk, kept, 1) for kept in sorted({0, *fitting})]
                made.append(Layout(each, blocks, chunk, 0, 2))
    return list(dict.fromkeys(made))  # of a small GPU seven eighths may be all


def _seven_eighths(gpu: Gpu) -> int:
    return max(1, gpu.multiprocessors - gpu.multiprocessors // 8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=0.2, help="per layout and case")
    parser.add_argument("--yardstick-bytes", type=int, default=2 << 30)
    parser.add_argument("--json", type=Path, help="written anew with each row")
    arguments = parser.parse_args(argv)
    device = tensors_of(arguments.device)
    result = gpu_run.begin(device)
    if result["environment"]["backend"] != "cuda":
        print(f"the layouts are the CUDA backend's; here {result['environment']['backend']} runs")
        return 1
    result["yardsticks"] = dataclasses.asdict(yardsticks(device, arguments.yardstick_bytes))
    result["environment"]["clocks"] = clocks(device)
    gpu_run.print_environment(result)
    gpu = Gpu(**result["environment"]["gpu"])
    for workload in WORKLOADS:
        for row in rows(workload, device, gpu, arguments.seconds):
            result["results"].append(row)
            print(line(row), flush=True)
            if arguments.json is not None:
                write_whole(result, arguments.json)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(*best(result["results"]), sep="\n")
    return 0


def rows(
    workload: Workload, device: torch.device, gpu: Gpu, seconds: float
) -> Iterator[dict[str, Any]]:
    copies = copies_of(workload, device)
    norm = float(fusedclip.get_total_norm(gradients_of(copies[0])))
    with _layout(""):
        own = layout_of(copies[0])
    for clipped in (False, True):
        for layout in layouts(gpu):
            row: dict[str, Any] = {
                "workload": workload.name,
                "bytes": workload.bytes,
                "case": "clipped" if clipped else "not clipped",
                **dataclasses.asdict(layout),
                "layout": layout.text,
                "leaves_room": layout.leaves_room(gpu),
                "own_layout": own,
            }
            try:
                row |= _compare(layout.text, copies, norm, clipped, Clock(device), seconds)
            except RuntimeError as error:  # a launch that the driver refuses
                row["error"] = str(error)
            yield row


def _compare(
    text: str,
    copies: Sequence[list[nn.Parameter]],
    norm: float,
    clipped: bool,
    clock: Clock,
    seconds: float,
) -> dict[str, float]:
    """Median seconds on the device with that layout and, in turn, with launch_shape.h's."""
    max_norm = norm * (FACTOR if clipped else 1 / FACTOR)
    times: dict[str, list[float]] = {text: [], "": []}
    turn = 0
    end = perf_counter() + seconds
    while turn < 2 * (MIN_ROUNDS + 1) or perf_counter() < end:
        for name in sorted(times, reverse=turn % 4 == 0):
            parameters = copies[turn % len(copies)]
            with _layout(name):
                taken = clock.device_time(
                    functools.partial(fusedclip.clip_, parameters, max_norm), 100e-6
                )
            times[name].append(taken)
            if clipped:
                restore(parameters, norm)
            turn += 1
    # The first of each may have loaded or allocated something.
    seconds_own, seconds_it = (statistics.median(times[name][1:]) for name in ("", text))
    return {"device": seconds_it, "own": seconds_own, "over_own": seconds_own / seconds_it}


@contextlib.contextmanager
def _layout(text: str) -> Iterator[None]:
    """The library reads the variable at each call; empty: launch_shape.h's."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def line(row: Mapping[str, Any]) -> str:
    room = "" if row["leaves_room"] else ", takes all"
    what = f"{row['workload']}, {row['case']}: {row['layout']}{room}"
    if "error" in row:
        return f"{what}: {row['error']}"
    return f"{what:<60} {section.time(row['device'])}, {row['over_own']:.3f}× as fast as the own"


def best(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each workload and case the fastest row, and the fastest that leaves room."""
    lines = []
    for key in dict.fromkeys((row["workload"], row["case"]) for row in rows):
        own = [r for r in rows if (r["workload"], r["case"]) == key and "error" not in r]
        for label, of in (("best", own), ("best, room", [r for r in own if r["leaves_room"]])):
            if of:
                lines.append(f"{label + ':':<12} {line(max(of, key=lambda r: r['over_own']))}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
