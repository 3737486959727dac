"""The benchmark's program on a GPU: prints a row as soon as it is measured, writes JSON after each
workload. Needs nothing beside torch and fusedclip.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import gpu
from .contestants import compiled, contestants
from .gpu_clock import Yardsticks, yardsticks
from .gpu_device import clocks, describe, tensors_of
from .json_file import write_whole
from .measure import environment
from .section import size, time
from .workloads import GPU_WORKLOADS

Row = dict[str, Any]


def run(arguments: argparse.Namespace) -> int:
    device = tensors_of(arguments.device)
    chosen = [w for w in GPU_WORKLOADS if arguments.only.lower() in w.name.lower()]
    if not chosen:
        names = ", ".join(w.name for w in GPU_WORKLOADS)
        print(f"no workload is named like {arguments.only!r}; there are: {names}")
        return 2
    result = _earlier(arguments, begin(device)) if arguments.compiled else None
    if result is None:
        result = begin(device)
        result["yardsticks"] = dataclasses.asdict(yardsticks(device, arguments.yardstick_bytes))
        result["environment"]["clocks"] = clocks(device)  # the GPU is awake now
    rod = Yardsticks(**result["yardsticks"])
    print_environment(result)
    for workload in chosen:
        own = compiled(len(workload.shapes)) if arguments.compiled else contestants(device)
        if not own:
            continue
        for measured in gpu.measure(workload, device, arguments.seconds, rod, own):
            row = json.loads(json.dumps(dataclasses.asdict(measured)))
            result["results"] = _with(result["results"], row)
            print(line(row), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if arguments.json is not None:
            write_whole(result, arguments.json)
    return 0


def begin(device: torch.device) -> Row:
    """What every result on a GPU begins with."""
    where = dataclasses.asdict(environment(device))
    where["gpu"] = dataclasses.asdict(describe(device))
    where["device"] = where["gpu"]["name"]
    where["layout_by_hand"] = os.environ.get("FUSEDCLIP_CUDA_LAYOUT")
    return {"environment": where, "yardsticks": {}, "results": []}


def print_environment(result: Row) -> None:
    where = result["environment"]
    gpu = where["gpu"]
    known = {
        "torch": where["torch"], "CUDA": gpu["cuda"], "Triton": gpu["triton"],
        "driver": gpu["driver"], "nvcc": gpu["nvcc"], "Python": where["python"],
    }  # fmt: skip
    print(f"{where['device']}, {gpu['multiprocessors']} multiprocessors, backend", end=" ")
    print(where["backend"], *(f"{k} {v or '?'}" for k, v in known.items()), sep=", ")
    for name, rate in result["yardsticks"].items():
        print(f"{name}: {rate / 1e12:.3f} TB/s")
    print("clocks:", where.get("clocks") or "not known", flush=True)


def line(row: Mapping[str, Any]) -> str:
    """A row as text: device time and its fraction of the yardsticks, host / wall time."""
    cells = [
        f"{name} {time(t['device'])} ({row['fractions'][name]:.0%}) "
        f"{time(t['host'])} / {time(t['wall'])}"
        for name, t in row["timings"].items()
    ]
    what = f"{row['workload']}, {size(row['bytes'])}, {row['case']}"
    ratio = row["ratios"].get("fusedclip")
    over = "" if ratio is None else f"  {ratio:.1f}× torch's wall time"
    return f"{what:<44} {' | '.join(cells)}{over}"


def _earlier(arguments: argparse.Namespace, here: Row) -> Row | None:
    """The file that a column is added to, if there is one."""
    if arguments.json is None or not arguments.json.exists():
        return None
    earlier: Row = json.loads(arguments.json.read_text())
    own = ("device", "torch", "fusedclip", "backend")
    for name in own:
        if earlier["environment"][name] != here["environment"][name]:
            raise SystemExit(
                f"{arguments.json} is of {name} {earlier['environment'][name]!r}, this is "
                f"{here['environment'][name]!r}: name another file"
            )
    return earlier


def _with(rows: Sequence[Row], row: Row) -> list[Row]:
    """``row`` added; what others have measured of the same case stays as it is."""
    key = (row["workload"], row["case"])
    merged = [*rows]
    for index, old in enumerate(rows):
        if (old["workload"], old["case"]) == key:
            columns = ("timings", "ratios", "fractions")
            merged[index] = {**old, **{c: {**row[c], **old[c]} for c in columns}}
            return merged
    return [*merged, row]
