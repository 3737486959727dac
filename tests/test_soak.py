"""A short soak: tests/soak.py has the calls, ``python -m tests.soak`` a million of them."""

import json
from pathlib import Path

import pytest

from tests import forked, soak

_ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads Linux's memory accounting"
)

_KEEPING = """
import sys
from tests import soak
kept = []
report = soak.soak(20_000, 0, after=kept.append)
print(report.growth_kib, len(kept))
sys.exit(0 if report.flat else 1)
"""


def test_twenty_thousand_calls_in_flat_memory(tmp_path: Path) -> None:
    """In a process of its own, where nothing else allocates."""
    out = tmp_path / "soak.json"
    run = forked.python("-m", "tests.soak", "--calls", "20000", "--json", out)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text())
    assert report["calls"] >= 20_000 and report["refused"] >= 1000
    assert max(report["rss_kib"]) - report["rss_kib"][0] <= soak.BOUND_KIB


def test_results_that_are_kept_are_noticed() -> None:
    """The twin: a leak of one result a call."""
    run = forked.python("-c", _KEEPING)
    assert run.returncode == 1, run.stdout + run.stderr
    growth, kept = map(int, run.stdout.split())
    assert kept >= 20_000 and growth > soak.BOUND_KIB
