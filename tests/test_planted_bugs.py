"""What the emulator would catch: each bug below, planted into the kernels, fails its driver.

``tests/emulator/driver.cu`` checks every path of csrc/cuda against fp64; here it is compiled with
the emulator and AddressSanitizer, once, with every bug in it. Compiling takes most of the time: so
a run chooses the bug, by PLANTED_BUG, and without one the kernels do what they do as they are.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parent.parent
_EMULATOR = _ROOT / "tests" / "emulator"


class Bug(NamedTuple):
    """Code of csrc/cuda, found by what stands before it, and what is planted in its place.

    Whole statements, or an expression.
    """

    before: str
    code: str
    planted: str

    def switched(self, number: int) -> str:
        """C++ that is ``planted`` in a run that chose this bug, and ``code`` in all others."""
        if self.code.endswith(";"):
            return f"if (planted_bug == {number}) {{ {self.planted} }} else {{ {self.code} }}"
        return f"(planted_bug == {number} ? ({self.planted}) : ({self.code}))"


BUGS = {
    "no barrier before a block's totals are read": Bug(
        "warp_totals[threadIdx.x / kWarp] = value;\n", "  __syncthreads();", ""
    ),
    "no barrier after they were read": Bug(
        "value = WarpTotal<kKind>(value);\n", "  __syncthreads();", ""
    ),
    "no barrier of the grid": Bug("  ", "cooperative_groups::this_grid().sync();", ""),
    "a chunk that runs past its gradient": Bug(
        "const uint64_t end = ",
        "cut + chunk_bytes < data_end ? cut + chunk_bytes : data_end",
        "cut + chunk_bytes",
    ),
    "a chunk that ends early": Bug(
        "static_cast<int>(vectors - begin) / item,\n",
        "          static_cast<int>(tail - vectors) / 16",
        "static_cast<int>(tail - vectors) / 16 - 1",
    ),
    "a dropped tail": Bug("if (", "i >= chunk.num_head + chunk.num_tail", "i >= chunk.num_head"),
    "stale residency: the first chunks' places taken for the last": Bug(
        "const int slot = ",
        "k - (num_mine - args.resident_chunks)",
        "args.resident_chunks == 0 ? -1 : k % args.resident_chunks",
    ),
    "a gradient measured that counts towards no norm": Bug(
        "if (", "table[entry].segment() != kNotCounted", "true"
    ),
    "a gradient scaled that counts towards no norm": Bug(
        "above = at + 1;\n    if (", "entry.segment() == kNotCounted", "false"
    ),
    "fp32 sums trusted outside fp32's range": Bug("|| ", "!NeedsWideSum(totals[0])", "true"),
    "a segment that ends where the list ends": Bug(
        "FirstChunk(table, args, segment),\n",
        "                          FirstChunk(table, args, segment + 1)",
        "args.num_chunks",
    ),
    "the look-up of a chunk ignores where it was": Bug(
        "const int chunk = blockIdx.x + k * gridDim.x;\n    entry = FindEntry(table, entry, ",
        "args.num_entries",
        "entry + 1",
    ),
    "a table with a hole between its parts": Bug("if (", "i < count", "i < count - 1"),
}

_SWITCH = """
#include <cstdlib>
inline const int planted_bug = [] {
  const char* number = std::getenv("PLANTED_BUG");
  return number == nullptr ? -1 : std::atoi(number);
}();
"""


def _plant_all(csrc: Path) -> None:
    """Put every bug into a copy of csrc/, each behind its number in BUGS."""
    texts = {path: path.read_text() for path in csrc.glob("cuda/*.cuh")}
    places = []  # (file, where the code begins, number, bug)
    for number, bug in enumerate(BUGS.values()):
        found = [
            (path, match.start() + len(bug.before), number, bug)
            for path, text in texts.items()
            for match in re.finditer(re.escape(bug.before + bug.code), text)
        ]
        assert len(found) == 1, f"the kernels have changed, plant the bug anew: {bug}"
        places += found
    for path, at, number, bug in sorted(places, reverse=True):  # the last of a file first
        text = texts[path]
        texts[path] = text[:at] + bug.switched(number) + text[at + len(bug.code) :]
    for path, text in texts.items():
        path.write_text(text)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver with every bug in it."""
    folder = tmp_path_factory.mktemp("driver")
    csrc = folder / "csrc"
    shutil.copytree(_ROOT / "csrc", csrc)
    _plant_all(csrc)
    (folder / "planted.h").write_text(_SWITCH)
    sources = [_EMULATOR / "emulator.cpp", _EMULATOR / "driver.cu", csrc / "cuda/launch_shape.cpp"]
    sources += sorted(csrc.glob("cuda/*.cu"))
    target = folder / "driver"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g1", "-w", "-fno-strict-aliasing",
         "-fsanitize=address", f"-I{_EMULATOR / 'include'}", f"-I{csrc}",
         "-include", folder / "planted.h", "-x", "c++", *sources, "-o", target],
        check=True,
    )  # fmt: skip
    return target


def _failures(driver: Path, bug: int | None) -> str:
    """What the driver says of the kernels with that bug; empty when it is content."""
    chosen = {} if bug is None else {"PLANTED_BUG": str(bug)}
    for layout in ("64,3,1024,2", "32,2,512,1"):
        run = subprocess.run(
            [driver, "1", "1"],  # of one seed, until something fails
            env={**os.environ, "FUSEDCLIP_CUDA_LAYOUT": layout, **chosen},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if run.returncode != 0:
            return run.stdout + run.stderr or f"exit status {run.returncode}"
    return ""


def test_the_kernels_as_they_are(driver: Path) -> None:
    assert _failures(driver, None) == ""


@pytest.mark.parametrize("bug", BUGS)
def test_is_caught(driver: Path, bug: str) -> None:
    assert _failures(driver, list(BUGS).index(bug))
