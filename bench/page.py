"""Tables and pictures of README.md and docs/ from ``bench/results/``: ``python -m bench.page``.

Nothing is measured here; a table stands between the markers of its name wherever a page has them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import (
    accuracy,
    amp,
    attacks,
    clipper,
    distributed,
    frameworks,
    gpu_page,
    monitor,
    report,
    step,
    support,
    sweep,
)  # fmt: skip
from .markers import between_markers
from .section import RESULTS

_ROOT = Path(__file__).parent.parent
PAGES = (
    _ROOT / "README.md",
    *(_ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "distributed", "frameworks")),
)
_IMAGES = _ROOT / "docs" / "images"

_SECTIONS = {
    "cpu": report.tables,
    "attacks": attacks.tables,
    "support": support.tables,
    **{
        own.SECTION.name: own.tables
        for own in (accuracy, amp, clipper, distributed, frameworks, monitor, step, sweep)
    },
}
_PLOTS = {"cpu": ("bench.png", report.plot_of), "sweep": ("sweep.png", sweep.plot)}


def tables() -> dict[str, str]:
    """By marker: those of all results that are there."""
    made: dict[str, str] = {}
    for name, render in _SECTIONS.items():
        data = _load(name)
        if data is not None:
            made |= render(data)
    return made | {"gpu": gpu_page.table(list(_gpu_results()))}


def written(path: Path, made: Mapping[str, str]) -> str:
    """The text of a page with its tables in place."""
    text = path.read_text()
    for name, table in made.items():
        text = between_markers(text, name, table)
    return text


def write() -> None:
    """All pages and pictures."""
    made = tables()
    for path in PAGES:
        path.write_text(written(path, made))
    for name, (picture, plot) in _PLOTS.items():
        data = _load(name)
        if data is not None:
            plot(data, _IMAGES / picture)
    results = list(_gpu_results())
    if results:
        gpu_page.plot(results, _IMAGES / "roofline.png")


def _load(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _gpu_results() -> Iterator[dict[str, Any]]:
    """What ``make gpu`` has left, a file a device and torch."""
    for path in sorted(RESULTS.glob("*-torch*.json")):
        yield json.loads(path.read_text())


if __name__ == "__main__":
    write()
