"""What a Monitor adds to a clip: ``python -m bench.monitor``.

A Clipper without a monitor and one with the norms of all parameters kept, in turn, medians of one
run; nothing is clipped.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch

import fusedclip

from .measure import side_by_side
from .section import Section, conditions, footer, main, size, time
from .workloads import Workload, equal

WORKLOADS = tuple(
    equal(count, elements)
    for count, elements in ((300, 333_333), (10, 16), (300, 16), (1000, 16), (10_000, 16))
)


def measure(seconds: float) -> dict[str, Any]:
    where = conditions()
    return {"environment": where, "rows": [_row(workload, seconds) for workload in WORKLOADS]}


def _row(workload: Workload, seconds: float) -> dict[str, Any]:
    cpu = torch.device("cpu")
    parameters = workload.parameters(cpu)
    plain = fusedclip.Clipper(parameters, 1e9)
    watched = fusedclip.Clipper(parameters, 1e9, monitor=True)
    for _ in range(5 if workload.bytes > 1e8 else 520):  # the memory of the window, once round
        watched.clip_()
    times, rounds = side_by_side((plain.clip_, watched.clip_), lambda: None, cpu, seconds)
    return {
        "tensors": len(parameters), "bytes": workload.bytes, "plain": times[0],
        "watched": times[1], "rounds": rounds,
    }  # fmt: skip


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = ["| gradients, fp32 | clip | with the monitor | added |", "|---|---|---|---|"]
    for row in result["rows"]:
        added = row["watched"] - row["plain"]
        lines.append(
            f"| {size(row['bytes'])} in {row['tensors']:,} tensors | {time(row['plain'])} | "
            f"{time(row['watched'])} | {1e6 * added:+.1f} µs, {added / row['plain']:+.1%} |"
        )
    return {"monitor": "\n".join([*lines, "", footer(result["environment"])]) + "\n"}


SECTION = Section("monitor", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
