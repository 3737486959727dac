"""Tables in Markdown pages, between two markers."""

from pathlib import Path


def put_between_markers(path: Path, name: str, table: str) -> None:
    path.write_text(between_markers(path.read_text(), name, table))


def between_markers(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the markers of ``name``; as it was where it has none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text:
        return text
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{table}{end}{rest.split(end, 1)[1]}"
