"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer.

A driver without Python calls everything from several threads at once. ``make sanitize`` runs the
suite over the whole module as well, which takes minutes.
"""

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sanitizers import driver

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="compiles all of x86-64's instruction sets"
)

# (sanitizer, the line as it is, the line as it would be, what is reported)
BUGS = {
    "a chunk past the end of its gradient": (
        "address,undefined",
        "borders_[share + 1].offset : spans_[span].numel;",
        "borders_[share + 1].offset : spans_[span].numel + 1;",
        "heap-buffer-overflow",
    ),
    "a partial sum too few": (
        "address,undefined",
        "std::vector<double> partial(plan.num_chunks());",
        "std::vector<double> partial(plan.num_chunks() - 1);",
        "heap-buffer-overflow",
    ),
    "a shift that is not defined": (
        "address,undefined",
        "int64_t cost = 0;",
        "int64_t cost = (num_spans << 62) & 0;",
        "runtime error: left shift",
    ),
    "two shares with a chunk in common": (
        "thread",
        "return span == borders_[share + 1].span ? borders_[share + 1].offset",
        "return span == borders_[share + 1].span ? borders_[share + 1].offset + kChunkElements",
        "data race",
    ),
    "shares whose end is not handed over": (
        "thread",
        "unfinished_.fetch_sub(done, std::memory_order_acq_rel) != done",
        "unfinished_.fetch_sub(done, std::memory_order_relaxed) != done",
        "data race",
    ),
    "a share claimed from the wrong end": (
        "thread",
        "front ? First(seen) : Stop(left)",
        "First(seen)",
        "was not run once|was not done",
    ),
    "a flag that two threads write": (
        "thread",
        "if (mine) changed.store(true);",
        "static int calls = 0;\n    ++calls;\n    if (mine) changed.store(true);",
        "data race",
    ),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """The driver and the kernels as they are, compiled once for each sanitizer."""
    return functools.cache(lambda name: driver.objects(name, tmp_path_factory.mktemp("objects")))


@pytest.mark.parametrize("isa", ["best", "avx2", "baseline"])
@pytest.mark.parametrize("sanitizer", driver.SANITIZERS)
def test_nothing_is_found(
    objects: Callable[[str], dict[str, Path]],
    sanitizer: str,
    isa: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSEDCLIP_CPU_ISA", "" if isa == "best" else isa)
    run = driver.run(objects(sanitizer), sanitizer, tmp_path)
    if "expected one of" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0 and run.stdout == "the same bits\n", run.stdout + run.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(
    objects: Callable[[str], dict[str, Path]], bug: str, tmp_path: Path
) -> None:
    sanitizer, before, after, report = BUGS[bug]
    planted = driver.with_bug(objects(sanitizer), before, after, sanitizer, tmp_path)
    run = driver.run(planted, sanitizer, tmp_path)
    said = run.stdout + run.stderr
    assert run.returncode != 0 and any(part in said for part in report.split("|")), said
