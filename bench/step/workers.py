"""The measuring processes, one for each fusedclip, and the turns that they take."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .turns import Times, Turn

_START = Path(__file__).parent / "start.py"


class Worker:
    """A process that times torch's clip and that of the fusedclip below ``root``."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_START), str(root),
             str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.about = self._read()
        if Path(self.about["root"]).resolve() != root.resolve():
            self.end()
            raise ValueError(f"there is no fusedclip in {root}")

    def size(self, of: Mapping[str, Any]) -> dict[str, int]:
        """How many tensors and bytes of gradients."""
        found: dict[str, int] = self._ask(of, None)
        return found

    def take(self, of: Mapping[str, Any], turn: Turn) -> Times:
        times: Times = self._ask(of, dataclasses.asdict(turn))
        return times

    def _ask(self, of: Mapping[str, Any], turn: Mapping[str, Any] | None) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"of": of, "turn": turn}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with status {self._process.wait()}")
        return json.loads(line)


Workers = Mapping[str, Worker]  # "now", and "before" where two checkouts are compared


@contextlib.contextmanager
def processes(now: Path, before: Path | None) -> Iterator[Workers]:
    """``before`` is a checkout; both must have, or both must lack, the native module."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Worker] = {}
        for name, root in (("now", now), ("before", before)):
            if root is not None:
                started[name] = Worker(root)
                stack.callback(started[name].end)
        native = {name: worker.about["cpu"] == "ok" for name, worker in started.items()}
        if len(set(native.values())) > 1:
            built = next(name for name in native if native[name])
            raise ValueError(f"only {built!r} has its native module built")
        yield started


def measure_in_turns(
    started: Workers, of: Mapping[str, Any], turn: Turn, turns: int
) -> dict[str, Any]:
    """Of each process, the ``summary`` of each contestant; the processes take turns."""
    times: dict[str, Times] = {name: {} for name in started}
    for done in range(turns):
        for name in list(started) if done % 2 == 0 else reversed(list(started)):
            for who, seconds in started[name].take(of, turn).items():
                times[name].setdefault(who, []).extend(seconds)
    return {
        name: {who: summary(seconds) for who, seconds in mine.items()}
        for name, mine in times.items()
    }


def summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median": float(np.median(seconds)),
        "p95": float(np.percentile(seconds, 95)),
        "mean": float(np.mean(seconds)),
        "calls": len(seconds),
    }
