"""Tables in Markdown pages, between two markers."""

from pathlib import Path


def put_between_markers(path: Path, name: str, table: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text()
    if begin in text:
        before, rest = text.split(begin, 1)
        path.write_text(f"{before}{begin}\n{table}{end}{rest.split(end, 1)[1]}")
