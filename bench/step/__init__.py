"""A clip as it is used, once a step: ``python -m bench.step``.

Cold: before each call other threads were idle for 5 ms and this one read 64 MB, so that the caches
hold other things and the teams of threads are asleep. Busy: beside one endless loop for each core,
150 calls in blocks of 25, back to back and, cold, once a step. Real: the clip timed inside
trainings, an arm with torch's and one with fusedclip's from one seed.

torch and fusedclip take turns in one process. With ``--against PATH``, another checkout of
fusedclip, built in place, is measured in a second process that takes turns with the first, each
beside torch.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fusedclip

from ..section import Section, conditions, main
from .calls import Gradients
from .load import endless_loops
from .models import LOOPS
from .table import tables
from .turns import Turn
from .workers import Workers, measure_in_turns, processes

__all__ = ["SECTION", "tables"]

_COLD = ((12, 4096), (300, 16), (1000, 1024))  # tensors and elements of each
_BUSY = ((12, 4096), (60, 4000), (100, 20_000), (100, 100_000))
_TURNS = 3  # of two blocks of 25 calls in the busy rows
_BLOCK = 25


def measure(
    seconds: float, against: Path | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    result: dict[str, Any] = {"environment": conditions()}
    with processes(Path(fusedclip.__file__).parent.parent, against) as started:
        for part in only or _PARTS:
            result[part] = _PARTS[part](started, seconds)
    return result


def _cold(started: Workers, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for count, elements in _COLD:
        of = Gradients(count, elements, cold=True)
        for clipped in (False, True):
            turn = Turn(clipped, seconds / 4, least=5, most=100)
            rows.append({"clipped": clipped, **_row(started, of, turn, 4)})
    return rows


def _busy(started: Workers, seconds: float) -> list[dict[str, Any]]:
    """Each row quiet and busy. The number of calls is fixed: a mean that hangs on a few long calls
    must not depend on how many there were time for."""
    rows = []
    for count, elements in _BUSY:
        for cold, clipped in ((False, False), (False, True), (True, False)):
            of = Gradients(count, elements, cold)
            turn = Turn(clipped, 0.0, least=2, most=2, block=_BLOCK)
            quiet = _row(started, of, turn, _TURNS)
            with endless_loops():
                busy = _row(started, of, turn, _TURNS)
            rows.append(
                {"clipped": clipped, **busy, "quiet": {name: quiet[name] for name in started}}
            )
    return rows


def _row(started: Workers, of: Gradients, turn: Turn, turns: int) -> dict[str, Any]:
    described = dataclasses.asdict(of)
    return {**described, **measure_in_turns(started, {"gradients": described}, turn, turns)}


def _real(started: Workers, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name, loop in LOOPS.items():
        of = {"loop": name}
        size = started["now"].size(of)
        for clipped in (False, True):
            turn = Turn(clipped, seconds / 4, least=2, most=100, block=loop.block)
            times = measure_in_turns(started, of, turn, 4)
            rows.append({**of, **size, "clipped": clipped, **times})
    return rows


_PARTS = {"cold": _cold, "busy": _busy, "real": _real}

SECTION = Section("step", measure, tables)


def run(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--against", type=Path, help="another checkout, to be compared with")
    own.add_argument("--only", nargs="+", choices=list(_PARTS), help="parts")
    chosen, _ = own.parse_known_args(argv)
    section = dataclasses.replace(
        SECTION, measure=functools.partial(measure, against=chosen.against, only=chosen.only)
    )
    return main(section, __doc__, argv, parents=[own])
