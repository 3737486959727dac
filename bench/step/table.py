"""The tables of the section; a comparison of two checkouts has a row for each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..section import footer, size, time


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """By marker, those of the parts that were measured."""
    where = footer(result["environment"])
    return {
        f"step-{part}": "\n".join([*make(result[part]), "", where]) + "\n"
        for part, make in _TABLES.items()
        if part in result
    }


def _cold(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| once a step, caches cold | | torch → fusedclip, median | | 95 % of the calls below | |"
    )
    yield "|---|---|---|---|---|---|"
    for row in rows:
        for whose, times in _contestants(row):
            cells = f"{_compared(times, 'median')} | {_compared(times, 'p95')}"
            yield f"| {_gradients(row)}{whose} | {_case(row)} | {cells} |"


def _busy(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| one endless loop a core | | torch → fusedclip, mean | | median | | 95 % below | "
        "| fusedclip's median on a quiet machine | busy to quiet |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        how = "once a step, caches cold" if row["cold"] else "back to back"
        for whose, times in _contestants(row):
            cells = " | ".join(_compared(times, name) for name in ("mean", "median", "p95"))
            quiet = row["quiet"]["before" if whose else "now"]["fusedclip"]["median"]
            yield (
                f"| {_gradients(row)}{whose} | {how}, {_case(row)} | {cells} | {time(quiet)} "
                f"| {times['fusedclip']['median'] / quiet:.1f} |"
            )


def _real(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| inside a training | | the clip, torch → fusedclip, median | | 95 % below | "
        "| the whole step | of which clipping |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        gradients = f"{row['tensors']} tensors, {size(row['bytes'])}"
        for whose, times in _contestants(row):
            steps = {who: times[f"{who} step"]["median"] for who in ("torch", "fusedclip")}
            shares = " → ".join(f"{times[who]['median'] / steps[who]:.1%}" for who in steps)
            cells = f"{_compared(times, 'median')} | {_compared(times, 'p95')}"
            whole = " → ".join(map(time, steps.values()))
            yield (
                f"| {row['loop']}, {gradients}{whose} | {_case(row)} | {cells} | {whole} "
                f"| {shares} |"
            )


_TABLES = {"cold": _cold, "busy": _busy, "real": _real}


def _contestants(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What to add to its name, and its times; two when another checkout was measured."""
    if "before" in row:
        yield ", before", row["before"]
    yield "", row["now"]


def _compared(times: Mapping[str, Any], name: str) -> str:
    """Both times and their ratio, of a named statistic."""
    theirs, ours = times["torch"][name], times["fusedclip"][name]
    return f"{time(theirs)} → {time(ours)} | **{theirs / ours:.1f}×**"


def _gradients(row: Mapping[str, Any]) -> str:
    count, elements = row["count"], row["elements"]
    return f"{count:,} × {elements:,}, {size(4 * count * elements)}"


def _case(row: Mapping[str, Any]) -> str:
    return "clipped" if row["clipped"] else "not clipped"
