"""What an attached Clipper and scopes cost: ``python -m bench.clipper``.

Each row is two calls in turn, medians of one run, on one thread: theirs with torch's clip, ours
with a Clipper.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fusedclip

from .markers import put_between_markers
from .measure import environment, side_by_side
from .workloads import equal

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    what: str
    theirs: float  # seconds
    ours: float

    def markdown(self) -> str:
        times = f"{1e3 * self.theirs:.2f} ms → {1e3 * self.ours:.2f} ms"
        return f"| {self.what} | {times} | **{self.theirs / self.ours:.1f}×** |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.clipper", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row (default: 4)")
    parser.add_argument("--markdown", type=Path, help="put the table between its markers")
    arguments = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [measure(arguments.seconds) for measure in (_groups, _parameters, _step)]
        e = environment(_CPU)
    finally:
        torch.set_num_threads(threads)
    lines = ["| | torch → fusedclip | |", "|---|---|---|", *(row.markdown() for row in rows)]
    lines += ["", f"{e.device}, 1 thread, torch {e.torch}, {e.date}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.markdown is not None:
        put_between_markers(arguments.markdown, "clipper", text)
    return 0


def _row(
    what: str, theirs: Callable[[], object], ours: Callable[[], object], seconds: float
) -> Row:
    times, _ = side_by_side((theirs, ours), lambda: None, _CPU, seconds)
    return Row(what, *times)


def _groups(seconds: float) -> Row:
    parameters = equal(300, 1024).parameters(_CPU)
    optimizer = torch.optim.SGD([{"params": [p], "max_norm": 1e9} for p in parameters], lr=0.1)

    def one_by_one() -> None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], group["max_norm"])

    ours = fusedclip.Clipper(optimizer, 1e9, scope="group").clip_
    return _row("300 groups of 1,024, each by its own norm", one_by_one, ours, seconds)


def _parameters(seconds: float) -> Row:
    parameters = equal(300, 1024).parameters(_CPU)

    def one_by_one() -> None:
        for p in parameters:
            nn.utils.clip_grad_norm_(p, 1e9)

    ours = fusedclip.Clipper(parameters, 1e9, scope="parameter").clip_
    return _row("300 parameters of 1,024, each by its own norm", one_by_one, ours, seconds)


def _step(seconds: float) -> Row:
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


if __name__ == "__main__":
    raise SystemExit(main())
