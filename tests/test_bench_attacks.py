"""``python -m bench.attacks``: reports of each kind become one table."""

import json
from pathlib import Path

from bench import attacks

_REPORTS = (
    {"backend": "cuda", "seed": 7, "seconds": 9.6, "sequences": 4, "steps": 2000, "calls": 300},
    {"calls": 1000, "refused": 10, "seed": 1, "seconds": 2.0, "rss_kib": [100, 103, 102]},
    {"sanitizers": "address,undefined", "tests": 1200, "failed": 0, "seconds": 60.0},
    {"sanitizers": "thread", "tests": 12, "failed": 2, "seconds": 6.0},
)


def test_records_and_table(tmp_path: Path) -> None:
    paths = []
    for number, report in enumerate(_REPORTS):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(report))
    page, out = tmp_path / "page.md", tmp_path / "attacks.json"
    page.write_text("<!-- attacks:begin -->\n<!-- attacks:end -->\n")
    arguments = [*map(str, paths), "--json", str(out), "--markdown", str(page)]
    assert attacks.main(arguments) == 0
    text = page.read_text()
    assert "| 4 sequences, 2,000 steps, 300 calls | 7 | 10 s | nothing |" in text
    assert "| 1 | 2 s | 3 KiB more memory than after the warm-up |" in text
    assert "| 1,200 tests | - | 60 s | nothing |" in text and "| 2 failed |" in text
    assert len(json.loads(out.read_text())["records"]) == 4
