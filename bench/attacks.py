"""What was run to break fusedclip, as one record and one table: ``python -m bench.attacks``.

It runs nothing. ``python -m tests.fuzz``, ``tests.soak`` and ``tests.sanitizers`` write what they
did with ``--json``; their files are put together here.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .markers import put_between_markers
from .measure import environment


@dataclass(frozen=True)
class Record:
    what: str
    amount: str
    seed: int | None
    seconds: float
    found: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.attacks", description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", help="what the attacks wrote")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument(
        "--markdown", type=Path, nargs="*", default=[], help="put the table between its markers"
    )
    arguments = parser.parse_args(argv)
    records = [record(json.loads(path.read_text())) for path in arguments.reports]
    e = environment(torch.device("cpu"))
    table = markdown(records, f"{e.device}, torch {e.torch}, {e.date}.")
    print(table)
    if arguments.json is not None:
        data = {
            "environment": dataclasses.asdict(e),
            "records": [dataclasses.asdict(r) for r in records],
        }
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    for path in arguments.markdown:
        put_between_markers(path, "attacks", table)
    return 0


def record(report: Mapping[str, Any]) -> Record:
    """From a report of any of the attacks."""
    seconds = float(report["seconds"])
    if "sequences" in report:
        kind = " (emulated, AddressSanitizer)" if report["backend"] == "cuda" else ""
        return Record(
            f"random sequences of calls against fp64, backend {report['backend']}{kind}",
            f"{report['sequences']:,} sequences, {report['steps']:,} steps, "
            f"{report['calls']:,} calls",
            report["seed"],
            seconds,
            "nothing",
        )
    if "rss_kib" in report:
        growth = max(report["rss_kib"]) - report["rss_kib"][0]
        return Record(
            "soak on lists that change",
            f"{report['calls']:,} calls, {report['refused']:,} of them refused as they should",
            report["seed"],
            seconds,
            f"{growth} KiB more memory than after the warm-up",
        )
    failed = report["failed"]
    return Record(
        f"the suite over the native module with -fsanitize={report['sanitizers']}",
        f"{report['tests']:,} tests",
        None,
        seconds,
        "nothing" if failed == 0 else f"{failed} failed",
    )


def markdown(records: Sequence[Record], where: str) -> str:
    lines = ["| what | how much | seed | time | found |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.what} | {r.amount} | {'-' if r.seed is None else r.seed} | {r.seconds:.0f} s | "
        f"{r.found} |"
        for r in records
    ]
    return "\n".join([*lines, "", where]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
