"""Sharded clipping on gloo processes of this machine: ``python -m bench.distributed``.

Each number is the median over the rounds of one run, of the rank whose median is the highest. All
ranks start each call behind a barrier, and the functions take turns.
"""

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fusedclip
from fusedclip.sharded.reduce import all_reduce

from .section import Section, conditions, footer, main

_MODEL_BYTES = 32e9  # the gradients of 8 billion parameters in fp32
# Not measured: a message between two nodes of a fast network, and one read of a GPU's memory.
_ASSUMED_HOP, _ASSUMED_BANDWIDTH = 10e-6, 3e12
_ROUNDS_PER_SECOND = 15  # of the slowest row
_COUNTS = (100, 1000)
_WORLD_SIZES = (2, 4)


def measure(seconds: float) -> dict[str, Any]:
    rounds = max(3, round(_ROUNDS_PER_SECOND * seconds))
    where = {**conditions(), "threads": 1}
    return {"environment": where, "jobs": [_start(size, rounds) for size in _WORLD_SIZES]}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    where = footer(result["environment"])
    return {"distributed": _times(result["jobs"], where), "model": _model(result["jobs"])}


def _times(results: Sequence[Mapping[str, Any]], where: str) -> str:
    lines = [
        "| FSDP2, gloo | torch → fusedclip, not clipped | | clipped | | all-reduce of one number |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            cells = " | ".join(
                f"{_ms(row[case]['torch'])} → {_ms(row[case]['fusedclip'])} | "
                f"**{row[case]['torch'] / row[case]['fusedclip']:.1f}×**"
                for case in ("unclipped", "clipped")
            )
            lines.append(
                f"| {result['world_size']} processes, {row['parameters']:,} parameters of 32 × 32 "
                f"| {cells} | {_ms(result['all_reduce'])} |"
            )
    lines += ["", f"One thread a process. {where}"]
    return "\n".join(lines) + "\n"


def _model(results: Sequence[Mapping[str, Any]]) -> str:
    """The measured latency on a tree of many ranks, beside one read of what a rank holds."""
    hop = results[0]["all_reduce"] / 2  # two ranks: one message there, one back
    bandwidth = results[0]["bandwidth"]
    lines = [
        f"| ranks | a rank's share of {_MODEL_BYTES / 1e9:.0f} GB | this machine: all-reduce | "
        "one read | assumed: all-reduce | one read |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in (2, 10**2, 10**3, 10**4, 10**5):
        depth = 2 * math.ceil(math.log2(ranks))
        share = _MODEL_BYTES / ranks
        lines.append(
            f"| {ranks:,} | {share / 1e6:,.1f} MB | {_ms(depth * hop)} | {_ms(share / bandwidth)} "
            f"| {_ms(depth * _ASSUMED_HOP)} | {_ms(share / _ASSUMED_BANDWIDTH)} |"
        )
    lines += [
        "",
        f"A model, not a measurement. This machine: {1e6 * hop:.0f} µs a message (half of the "
        "measured all-reduce of 2 processes, gloo) and "
        f"{bandwidth / 1e9:.1f} GB/s (measured, one thread). "
        f"Assumed: {1e6 * _ASSUMED_HOP:.0f} µs a message, {_ASSUMED_BANDWIDTH / 1e12:.0f} TB/s.",
    ]
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _start(world_size: int, rounds: int) -> dict[str, Any]:
    """Run ``_measure`` in ``world_size`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c",
                 "import sys; from fusedclip.bench.distributed import work; work(*sys.argv[1:])",
                 str(rank), str(world_size), str(rounds), folder],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for process in processes:
            if process.wait() != 0:
                raise RuntimeError(f"a rank ended with status {process.returncode}")
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
        return result


def work(rank: str, world_size: str, rounds: str, folder: str) -> None:
    """What one process does; rank 0 writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(world_size)
    )
    number = torch.zeros(1, dtype=torch.float64)
    latency = _medians({"all_reduce": lambda: dist.all_reduce(number)}, 5 * int(rounds))
    rows = [_row(count, int(rounds)) for count in _COUNTS]
    if rank == "0":
        result = {
            "world_size": int(world_size), **latency, "bandwidth": _bandwidth(),
            "rows": rows,
        }  # fmt: skip
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _bandwidth() -> float:
    """Bytes/s of one read of local gradients, on one thread."""
    p = nn.Parameter(torch.empty(25_000_000))
    p.grad = torch.full_like(p, 1e-3)
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        fusedclip.clip_([p], math.inf)
        seconds.append(time.perf_counter() - start)
    return p.nbytes / statistics.median(seconds)


def _row(count: int, rounds: int) -> dict[str, Any]:
    params = _fsdp2(count)
    norm = fusedclip.clip_(params, float("inf")).item()
    row: dict[str, Any] = {"parameters": count}
    for case, max_norm in (("unclipped", 2 * norm), ("clipped", 1e-30)):
        row[case] = _medians(
            {
                "torch": functools.partial(nn.utils.clip_grad_norm_, params, max_norm),
                "fusedclip": functools.partial(fusedclip.clip_grad_norm_, params, max_norm),
            },
            rounds,
            restore=lambda: _fill(params),
        )
    return row


def _fsdp2(count: int) -> list[nn.Parameter]:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(count)])
    fully_shard(model)
    model(torch.randn(4, 32)).sum().backward()
    params = list(model.parameters())
    _fill(params)
    return params


def _fill(params: Sequence[nn.Parameter]) -> None:
    for p in params:
        p.grad._local_tensor.fill_(1e-3)  # type: ignore[union-attr]


def _medians(
    calls: dict[str, Callable[[], Any]], rounds: int, restore: Callable[[], None] | None = None
) -> dict[str, float]:
    """The median time of each in seconds, on the rank where it is the highest."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):  # three to warm up
        for name, call in calls.items():
            if restore is not None:
                restore()
            dist.barrier()
            start = time.perf_counter()
            call()
            if round_ >= 3:
                times[name].append(time.perf_counter() - start)
    medians = {}
    for name, mine in times.items():
        # Not torch's: a rank may end soon after it (fusedclip/sharded/reduce.py, _lent).
        median = torch.tensor([statistics.median(mine)], dtype=torch.float64)
        medians[name] = all_reduce(median, "max", dist.group.WORLD).item()
    return medians


SECTION = Section("distributed", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
