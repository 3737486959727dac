"""What an attached Clipper and scopes cost: ``python -m bench.clipper``.

Each row is two calls in turn, medians of one run: theirs with torch's clip, ours with a Clipper.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import fusedclip

from .measure import side_by_side
from .section import Section, conditions, footer, main, time
from .workloads import equal

_CPU = torch.device("cpu")


def measure(seconds: float) -> dict[str, Any]:
    where = conditions()
    return {
        "environment": where,
        "rows": [row(seconds) for row in (_groups, _parameters, _step)],
    }


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = ["| | torch → fusedclip | |", "|---|---|---|"]
    for row in result["rows"]:
        ratio = row["torch"] / row["fusedclip"]
        times = f"{time(row['torch'])} → {time(row['fusedclip'])}"
        lines.append(f"| {row['what']} | {times} | **{ratio:.1f}×** |")
    return {"clipper": "\n".join([*lines, "", footer(result["environment"])]) + "\n"}


def _row(
    what: str, theirs: Callable[[], object], ours: Callable[[], object], seconds: float
) -> dict[str, Any]:
    times, rounds = side_by_side((theirs, ours), lambda: None, _CPU, seconds)
    return {"what": what, "torch": times[0], "fusedclip": times[1], "rounds": rounds}


def _groups(seconds: float) -> dict[str, Any]:
    parameters = equal(300, 1024).parameters(_CPU)
    optimizer = torch.optim.SGD([{"params": [p], "max_norm": 1e9} for p in parameters], lr=0.1)

    def one_by_one() -> None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], group["max_norm"])

    ours = fusedclip.Clipper(optimizer, 1e9, scope="group").clip_
    return _row("300 groups of 1,024, each by its own norm", one_by_one, ours, seconds)


def _parameters(seconds: float) -> dict[str, Any]:
    parameters = equal(300, 1024).parameters(_CPU)

    def one_by_one() -> None:
        for p in parameters:
            nn.utils.clip_grad_norm_(p, 1e9)

    ours = fusedclip.Clipper(parameters, 1e9, scope="parameter").clip_
    return _row("300 parameters of 1,024, each by its own norm", one_by_one, ours, seconds)


def _step(seconds: float) -> dict[str, Any]:
    """The same gradients step after step: what a step does to parameters does not matter here."""
    workload = equal(300, 83_333)  # 100 MB
    both = []
    for _ in range(2):
        parameters = workload.parameters(_CPU)
        both.append((parameters, torch.optim.AdamW(parameters, lr=1e-6, fused=True)))
    (theirs, their_optimizer), (ours, our_optimizer) = both
    fusedclip.Clipper(ours, 1e9).attach(our_optimizer)

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(theirs, 1e9)
        their_optimizer.step()

    what = "fused AdamW, clip and step, 100 MB fp32"
    return _row(what, clip_and_step, our_optimizer.step, seconds)


SECTION = Section("clipper", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
