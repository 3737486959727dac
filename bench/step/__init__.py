"""A clip as it is used, once a step: ``python -m bench.step``.

Cold: before each call other threads were idle for 5 ms and this one read 64 MB, so that the caches
hold other things and the teams of threads are asleep.

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
from .calls import Amount, Spec
from .table import tables
from .workers import Workers, workers
from .workers import measure as measure_in_turns

__all__ = ["SECTION", "tables"]

_TURNS = 4
_COLD = ((12, 4096), (300, 16), (1000, 1024))  # tensors and elements of each


def measure(
    seconds: float, against: Path | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    result: dict[str, Any] = {"environment": conditions()}
    with workers(Path(fusedclip.__file__).parent.parent, against) as started:
        for part in only or _PARTS:
            result[part] = _PARTS[part](started, seconds)
    return result


def _cold(started: Workers, seconds: float) -> list[dict[str, Any]]:
    amount = Amount(seconds / _TURNS, least=5, most=100)
    return [
        _row(started, Spec(count, elements, clipped, cold=True), amount)
        for count, elements in _COLD
        for clipped in (False, True)
    ]


def _row(started: Workers, spec: Spec, amount: Amount) -> dict[str, Any]:
    what = dataclasses.asdict(spec)
    return {**what, **measure_in_turns(started, what, amount, _TURNS)}


_PARTS = {"cold": _cold}

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
