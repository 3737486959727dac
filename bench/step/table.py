"""The tables of the section; a comparison of two checkouts has a row for each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..section import footer, size, time


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """By marker, those of the parts that were measured."""
    where = footer(result["environment"])
    return {
        f"step-{part}": "\n".join([*make(result[part]), "", where]) + "\n"
        for part, make in (("cold", _cold),)
        if part in result
    }


def _cold(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| once a step, caches cold | | torch → fusedclip, median | | 95th percentile | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        for whose, times in _contestants(row):
            yield f"| {_what(row)}{whose} | {_case(row)} | {_cells(times, 'median', 'p95')} |"


def _contestants(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What to call it, and its times; two when another checkout was measured."""
    if "before" in row:
        yield ", before", row["before"]
    yield "", row["now"]


def _cells(times: Mapping[str, Any], *names: str) -> str:
    """torch → fusedclip and the ratio, of each named statistic."""
    return " | ".join(
        f"{time(times['torch'][name])} → {time(times['fusedclip'][name])} | "
        f"**{times['torch'][name] / times['fusedclip'][name]:.1f}×**"
        for name in names
    )


def _what(row: Mapping[str, Any]) -> str:
    count, elements = row["count"], row["elements"]
    return f"{count:,} × {elements:,}, {size(4 * count * elements)}"


def _case(row: Mapping[str, Any]) -> str:
    return "clipped" if row["clipped"] else "not clipped"
