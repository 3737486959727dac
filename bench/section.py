"""A section of the report: what is measured, the JSON file that keeps it, the tables made of it.

Tables are made of the JSON alone, so a page can be written again without measuring again.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .markers import put_between_markers
from .measure import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Section:
    """``measure(seconds)`` answers with what JSON can hold; ``tables`` are by marker."""

    name: str  # of the JSON file
    measure: Callable[[float], Any]  # about so many seconds for each comparison
    tables: Callable[[Any], Mapping[str, str]]

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


def main(
    section: Section,
    description: str | None,
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> int:
    """The command line of one section; ``parents`` have options of its own."""
    parser = argparse.ArgumentParser(
        prog=f"bench.{section.name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=list(parents),
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per comparison (default: 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument(
        "--markdown", type=Path, nargs="*", default=[], help="put the tables between their markers"
    )
    arguments = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        result = section.measure(arguments.seconds)
    finally:
        torch.set_num_threads(threads)
    if arguments.json is not None:
        write(result, arguments.json)
    tables = section.tables(json.loads(json.dumps(result)))
    print(*tables.values(), sep="\n")
    for path in arguments.markdown:
        for name, table in tables.items():
            put_between_markers(path, name, table)
    return 0


def write(result: Any, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def conditions() -> dict[str, Any]:
    """Where and when, to be asked for before anything is measured."""
    return dataclasses.asdict(environment(torch.device("cpu")))


def footer(where: Mapping[str, Any]) -> str:
    """The line below a table."""
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    return (
        f"{where['device']}, {threads}, torch {where['torch']}, Python {where['python']}, "
        f"{where['date']}; load average beforehand {where['load']:.1f}."
    )


def time(seconds: float) -> str:
    if seconds >= 0.1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds >= 1e-3:
        return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-2 else f"{1e3 * seconds:.2f} ms"
    return f"{1e6 * seconds:.0f} µs" if seconds >= 1e-5 else f"{1e6 * seconds:.1f} µs"


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, each, digits in (("GB", 10**9, 1), ("MB", 10**6, 0), ("KB", 10**3, 0)):
        if count >= each:
            return f"{count / each:.{digits}f} {unit}"
    return f"{count} B"
