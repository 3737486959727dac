"""Mixed precision on the CPU, against torch's own sequence: ``python -m bench.amp``.

torch: ``scaler.unscale_(optimizer)``, ``clip_grad_norm_`` and, in the last rows, ``scaler.step``.
fusedclip: ``unscale_`` of ``fusedclip.amp.GradScaler``, or its ``step`` alone. The two take turns;
each number is a median of one run.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fusedclip

from .measure import Call, side_by_side
from .section import Section, conditions, footer, main, time
from .workloads import Workload, equal

_CPU = torch.device("cpu")
_SCALE = 2.0**10
_WORKLOADS = (equal(300, 333_333), equal(300, 333_333, torch.bfloat16), equal(1000, 1024))
_STEPS = (equal(300, 333_333), equal(1000, 1024))


@dataclass(frozen=True)
class Row:
    """Median seconds; ``floor`` is what the fewest bytes take."""

    name: str
    unclipped: tuple[float, float]  # torch, fusedclip: the norm is half the threshold
    clipped: tuple[float, float]  # the norm is twice the threshold
    floor: float
    floor_of: str


def measure(seconds: float) -> dict[str, Any]:
    where = conditions()
    rows = [unscale_and_clip(workload, seconds) for workload in _WORKLOADS]
    rows += [fused_step(workload, seconds) for workload in _STEPS]
    return {"environment": where, "rows": [dataclasses.asdict(row) for row in rows]}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = [
        "| torch → fusedclip | not clipped | | clipped | | floor |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = " | ".join(
            f"{time(theirs)} → {time(ours)} | **{theirs / ours:.1f}×**"
            for theirs, ours in (row["unclipped"], row["clipped"])
        )
        lines.append(f"| {row['name']} | {cells} | {time(row['floor'])}: {row['floor_of']} |")
    return {"amp": "\n".join([*lines, "", footer(result["environment"])]) + "\n"}


def unscale_and_clip(workload: Workload, seconds: float) -> Row:
    """Up to where an optimizer reads the gradients. The floor: 3N bytes, clipped or not."""
    params = workload.parameters(_CPU)
    optimizer = torch.optim.SGD(params)
    flat = torch.randn(workload.elements).to(workload.dtypes[0])
    (read, write), _ = side_by_side(
        (flat.sum, lambda: flat.mul_(0.9999)), lambda: None, _CPU, seconds
    )

    def compare(loose: bool) -> tuple[float, float]:
        theirs, ours, limit = _scalers(params, loose)

        def torch_sequence() -> None:
            theirs.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, limit)

        return _compare(params, theirs, ours, torch_sequence, lambda: ours.unscale_(optimizer),
                        loose, seconds)  # fmt: skip

    return Row(f"unscale and clip, {_size(workload)}", compare(True), compare(False), read + write,
               "3N bytes")  # fmt: skip


def fused_step(workload: Workload, seconds: float) -> Row:
    """The step of torch's fused AdamW, clip included. The floor: one read, N, and the bare step."""
    params = workload.parameters(_CPU)
    optimizer = torch.optim.AdamW(params, lr=0.0, fused=True)
    flat = torch.randn(workload.elements)
    (read, step), _ = side_by_side((flat.sum, optimizer.step), lambda: None, _CPU, seconds)

    def compare(loose: bool) -> tuple[float, float]:
        theirs, ours, limit = _scalers(params, loose)

        def torch_sequence() -> None:
            theirs.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, limit)
            theirs.step(optimizer)

        return _compare(params, theirs, ours, torch_sequence, lambda: ours.step(optimizer),
                        loose, seconds)  # fmt: skip

    return Row(f"step of fused AdamW, {_size(workload)}", compare(True), compare(False),
               read + step, "N bytes + the bare step")  # fmt: skip


def _scalers(
    params: Sequence[nn.Parameter], loose: bool
) -> tuple[torch.amp.GradScaler, fusedclip.amp.GradScaler, float]:
    """torch's, fusedclip's and the threshold."""
    norm = fusedclip.clip_(params, float("inf")).item() / _SCALE
    limit = 2 * norm if loose else norm / 2
    theirs = torch.amp.GradScaler("cpu", init_scale=_SCALE)
    ours = fusedclip.amp.GradScaler("cpu", init_scale=_SCALE, max_norm=limit)
    for scaler in (theirs, ours):
        scaler.scale(torch.ones(()))
    return theirs, ours, limit


def _compare(
    params: Sequence[nn.Parameter],
    theirs: torch.amp.GradScaler,
    ours: torch.amp.GradScaler,
    torch_call: Call,
    our_call: Call,
    loose: bool,
    seconds: float,
) -> tuple[float, float]:
    grads = [p.grad for p in params if p.grad is not None]

    def restore() -> None:
        torch._foreach_mul_(grads, _SCALE if loose else 2 * _SCALE)
        for scaler in (theirs, ours):
            scaler.update(_SCALE)

    medians, _ = side_by_side((torch_call, our_call), restore, _CPU, seconds)
    return medians


def _size(workload: Workload) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[workload.dtypes[0]]
    return f"{workload.bytes / 1e6:.0f} MB {kind}, {len(workload.shapes):,} tensors"


SECTION = Section("amp", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
