"""What was verified with which versions: written by passing tests, shown in docs/frameworks.md.

A test marked ``@verifies("system", "package", what="...")`` that passes becomes an entry of
``verified.json`` when pytest is given ``--record``; the table of the page is made of these entries.
Without ``--record`` the entries are compared with the versions that are installed. Only the
standard library is needed here, so that the page can be checked where no framework is installed.
"""

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RECORD = Path(__file__).parent / "verified.json"
# Packages that the others must not see (Makefile).
APART = Path(sys.prefix) / "apart"
PAGE = ROOT / "docs" / "frameworks.md"


@dataclass(frozen=True)
class Entry:
    """A test that passed."""

    test: str  # pytest's id, from this folder on
    system: str
    versions: dict[str, str]  # of the packages, as they were installed
    what: str


def verifies(system: str, *packages: str, what: str) -> pytest.MarkDecorator:
    """Marks a test whose passing goes into the page: ``what`` of ``system`` ran."""
    return pytest.mark.verifies(system=system, packages=packages, what=what)


def entry(item: pytest.Item) -> Entry | None:
    """What ``item`` verifies when it passes; ``None`` for a test that is not of a system."""
    mark = item.get_closest_marker("verifies")
    if mark is None:
        return None
    versions = {package: installed(package) for package in ("torch", *mark.kwargs["packages"])}
    return Entry(short_id(item), mark.kwargs["system"], versions, mark.kwargs["what"])


def short_id(item: pytest.Item) -> str:
    return item.nodeid.removeprefix("tests/integrations/")


def installed(package: str) -> str:
    """Its version without the build's label: 2.13.0 for 2.13.0+cpu."""
    found = importlib.metadata.distributions(name=package, path=[*sys.path, str(APART)])
    return next(iter(found)).version.partition("+")[0]


def read() -> list[Entry]:
    if not RECORD.exists():
        return []
    return [Entry(**values) for values in json.loads(RECORD.read_text())]


def write(entries: Iterable[Entry]) -> None:
    ordered = sorted(entries, key=lambda e: (e.system.casefold(), e.test))
    RECORD.write_text(json.dumps([asdict(e) for e in ordered], indent=1) + "\n")


def updated(old: Sequence[Entry], passed: Sequence[Entry], collected: set[str]) -> list[Entry]:
    """The record after a run: what passed, and the old entries of files that were not run.

    Args:
        collected: the ids of all tests of the run, passed or not.
    """
    files = {test.partition("::")[0] for test in collected}
    kept = [
        e
        for e in old
        if e.test.partition("::")[0] not in files
        and (RECORD.parent / e.test.partition("::")[0]).exists()
    ]
    return [*kept, *passed]


def table(entries: Sequence[Entry]) -> str:
    """The page's table: a row for each system, in alphabetical order."""
    lines = [
        "| system | verified with | what ran, with torch's clip and with fusedclip's |",
        "|---|---|---|",
    ]
    for system in sorted({e.system for e in entries}, key=str.casefold):
        own = [e for e in entries if e.system == system]
        versions = {
            package: version
            for e in own
            for package, version in e.versions.items()
            if package != "torch" or len(e.versions) == 1
        }
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        ran = "; ".join(dict.fromkeys(e.what for e in own))
        lines.append(f"| {system} | {packages} | {ran} |")
    torches = sorted({e.versions["torch"] for e in entries})
    lines += [
        "",
        f"All with torch {', '.join(torches)} on the CPU. Written by the tests themselves.",
    ]
    return "\n".join(lines) + "\n"


def shown(page: str) -> str:
    """The table that stands in the page."""
    found = re.search(r"<!-- verified:begin -->\n(.*?)<!-- verified:end -->", page, re.DOTALL)
    return "" if found is None else found[1]
