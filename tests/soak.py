"""Very many calls in one process, and memory that stays flat: ``python -m tests.soak``.

Lists and gradients change all the time: parameters come and go, gradients move, and change their
size and type. Some calls are refused. tests/test_soak.py has a short run.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import amp

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_TENSORS = 24
_MOST_ELEMENTS = 300

# Allocators round up and keep some. In a million calls a leak of two bytes each is more.
BOUND_KIB = 1024


@dataclass(frozen=True)
class Report:
    calls: int
    refused: int  # calls that raised, as they should
    seed: int
    seconds: float
    rss_kib: tuple[int, ...]  # after the warm-up, then at equal distances
    objects: tuple[int, ...]  # that the garbage collector knows, at the same moments

    @property
    def growth_kib(self) -> int:
        return max(self.rss_kib) - self.rss_kib[0]

    @property
    def flat(self) -> bool:
        # A few hundred objects more or fewer are lists of parameters of another length.
        return self.growth_kib <= BOUND_KIB and self.objects[-1] - self.objects[0] <= 500


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args(argv)
    report = soak(arguments.calls, arguments.seed)
    print(
        f"{report.calls:,} calls ({report.refused:,} refused as they should), seed {report.seed}, "
        f"{report.seconds:.0f} s; resident memory {report.rss_kib[0]} KiB after the warm-up, at "
        f"most {report.growth_kib} KiB more later; {report.objects[0]} objects, then "
        f"{report.objects[-1]}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(dataclasses.asdict(report)) + "\n")
    return 0 if report.flat else 1


def soak(calls: int, seed: int, after: Callable[[object], None] = lambda result: None) -> Report:
    """A fifth of ``calls`` to warm up and then the rest; ``after`` sees the result of each."""
    start = time.perf_counter()
    work = _Work(random.Random(seed), seed)
    rounds = work.rounds(after)
    samples = 10
    rss: list[int] = []
    objects: list[int] = []
    for sample in range(samples + 1):
        wanted = calls // 5 + sample * (calls - calls // 5) // samples
        while work.calls < wanted:
            next(rounds)
        gc.collect()
        if sample == 0:
            gc.get_objects()  # the list is megabytes itself
        rss.append(_rss_kib())
        objects.append(len(gc.get_objects()))
    seconds = time.perf_counter() - start
    return Report(work.calls, work.refused, seed, seconds, tuple(rss), tuple(objects))


class _Work:
    """The parameters, and what is called on them."""

    def __init__(self, choose: random.Random, seed: int) -> None:
        self.calls = 0
        self.refused = 0
        self._choose = choose
        self._generator = torch.Generator().manual_seed(seed)
        self._params = [self._parameter() for _ in range(_MOST_TENSORS)]

    def rounds(self, after: Callable[[object], None]) -> Iterator[None]:
        """Change something, then call everything once on a list of some of the parameters."""
        while True:
            self._change()
            count = self._choose.randint(1, _MOST_TENSORS)
            some = self._choose.sample(self._params, count)
            for call in self._accepted(some):
                after(call())
                self.calls += 1
            call = self._choose.choice(self._refused(some))
            try:
                call()
            except (ValueError, TypeError, RuntimeError) as error:
                after(error)
                self.refused += 1
            else:
                raise AssertionError("a call that must be refused was not")
            self.calls += 1
            yield

    def _parameter(self) -> nn.Parameter:
        p = nn.Parameter(torch.zeros(1, dtype=self._choose.choice(_DTYPES)))
        self._renew(p)
        return p

    def _renew(self, p: nn.Parameter) -> None:
        size = self._choose.randint(0, _MOST_ELEMENTS)
        p.data = torch.zeros(size, dtype=p.dtype)
        p.grad = torch.randn(size, generator=self._generator).to(p.dtype)

    def _change(self) -> None:
        index = self._choose.randrange(_MOST_TENSORS)
        if self._choose.random() < 0.1:
            self._params[index] = self._parameter()
        else:
            self._renew(self._params[index])

    def _accepted(self, some: list[nn.Parameter]) -> list[Callable[[], object]]:
        grads = [p.grad for p in some if p.grad is not None]
        limit = self._choose.choice((0.5, 1e6, math.inf))
        clipper = fusedclip.Clipper(some, limit, scope=self._choose.choice(("global", "parameter")))
        adaptive = fusedclip.Clipper(some, fusedclip.AutoClip(percentile=90, window=4))
        return [
            lambda: fusedclip.clip_(some, limit),
            lambda: fusedclip.clip_(some, torch.tensor(limit), math.inf, nonfinite="zero"),
            lambda: fusedclip.clip_(some, limit, 3.0),
            lambda: fusedclip.clip_grad_norm_(iter(some), limit),
            lambda: fusedclip.get_total_norm(grads),
            lambda: fusedclip.get_tensor_norms(grads),
            lambda: fusedclip.clip_grads_with_norm_(some, 1.0, torch.tensor(0.5)),
            lambda: fusedclip.clip_grad_value_(some, 0.25),
            clipper.clip_,
            adaptive.clip_,
            lambda: _attached_step(some),
            lambda: _amp_step(some),
        ]

    def _refused(self, some: list[nn.Parameter]) -> list[Callable[[], object]]:
        bad = nn.Parameter(torch.zeros(2))
        bad.grad = torch.tensor([math.nan, 1.0])
        overlapping = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
        memory = torch.zeros(4)
        overlapping[0].grad, overlapping[1].grad = memory[:3], memory[1:]
        return [
            lambda: fusedclip.clip_(some, math.nan),
            lambda: fusedclip.clip_(some, 1.0, nonfinite="never"),
            lambda: fusedclip.clip_([*some, "no tensor"], 1.0),  # type: ignore[list-item]
            lambda: fusedclip.clip_([*some, bad], 1.0, nonfinite="error"),
            lambda: fusedclip.clip_([*some, *overlapping], 1.0),
        ]


def _attached_step(some: list[nn.Parameter]) -> Tensor | None:
    optimizer = torch.optim.SGD(some, lr=0.1)
    clipper = fusedclip.Clipper(optimizer, 1.0)
    handle = clipper.attach(optimizer)
    optimizer.step()
    handle.remove()
    return clipper.last_norm


def _amp_step(some: list[nn.Parameter]) -> object:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    own = [p for p in some if p.dtype != torch.float16] or [nn.Parameter(torch.zeros(1))]
    return amp.unscale_and_clip_(scaler, torch.optim.SGD(own, lr=0.1), 1.0)


def _rss_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


if __name__ == "__main__":
    sys.exit(main())
