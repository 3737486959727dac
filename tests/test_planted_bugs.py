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


# What is kept is whole chunks, a part of one, nothing; the launches are one, one for each phase,
# and one that the device refuses. The last needs more shared memory than a kernel has unasked.
_LAYOUTS = (
    "64,3,1024,4096,1", "64,3,1024,0,2", "32,2,8192,4096,1", "64,9,512,0,1", "64,2,4096,65536,1",
)  # fmt: skip


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
    # A block and its warps.
    "no barrier before a block's totals are read": Bug(
        "warp_totals[threadIdx.x / kWarp] = value;\n", "  __syncthreads();", ""
    ),
    "the warps of a block take the same chunks": Bug(
        "const int index = static_cast<int>(",
        "threadIdx.x / kWarp * gridDim.x + blockIdx.x",
        "blockIdx.x",
    ),
    "every warp takes as many chunks as the one with most": Bug(
        "args.rounds - ", "one_less", "false"
    ),
    "the lanes of a whole tile overlap": Bug(
        "for (int k = 0; k < kInFlight; ++k) ",
        "tile[k] = read(k * kWarp);",
        "tile[k] = read(k);",
    ),
    "a tile read past the end of its chunk": Bug(
        "tile[k] = ", "k * kWarp + lane < num", "k * kWarp + lane <= num"
    ),
    "a tile written past the end of its chunk": Bug(
        "if (", "k * kWarp + lane < num", "k * kWarp + lane <= num"
    ),
    # The barriers of a grid, and launches in their place.
    "no barrier of the grid": Bug(
        "if (kPhase == Phase::kAll) ", "cooperative_groups::this_grid().sync();", ""
    ),
    "no barrier between the totals of segments and the decisions": Bug(
        "Totals(args, table, warp);\n    ", "cooperative_groups::this_grid().sync();", ""
    ),
    "a refused grid is no reason for ordinary launches": Bug("if (", "IsRefusal(error)", "false"),
    "ordinary launches that add up no totals of segments": Bug(
        "if (!one) ", "Ordinary<Phase::kTotals>();", ""
    ),
    "ordinary launches that finish nothing": Bug(
        "if (one || args.scale) ", "Ordinary<Phase::kFinish>();", ""
    ),
    "ordinary launches that finish without measuring": Bug(
        "Cooperative()) return;\n    ", "Ordinary<Phase::kMeasure>();", ""
    ),
    "shared memory that nobody asked for": Bug(
        "    ", "AllowSharedMemory<kKernel>(place.device);", ""
    ),
    # Chunks, and what is kept of them.
    "a chunk that runs past its gradient": Bug(
        "const uint64_t end = ",
        "cut + chunk_bytes < data_end ? cut + chunk_bytes : data_end",
        "cut + chunk_bytes",
    ),
    "a chunk that ends early": Bug(
        "const int num_vectors = ",
        "static_cast<int>(end - vectors) / 16",
        "static_cast<int>(end - vectors) / 16 - 1",
    ),
    "a dropped tail": Bug("if (", "lane >= num_head + num_tail", "lane >= num_head"),
    "stale residency: the first chunks' places taken for the last": Bug(
        "continue;\n    const Chunk located = LocateChunk(found, chunk, args.chunk_bytes);\n"
        "    const Kept kept = KeptOf(args, ",
        "warp.rounds - 1 - k",
        "k",
    ),
    "warps that keep their chunks in the same place": Bug(
        "const int own = ", "static_cast<int>(threadIdx.x / kWarp) * args.resident_vectors", "0"
    ),
    "a chunk that is kept in part taken for whole": Bug(
        "return ", "tile + num <= count", "count > 0"
    ),
    # The look-up of an entry.
    "a guess that is not checked": Bug(
        "if (begun && ", "chunk < table[candidate + 1].first_chunk", "true"
    ),
    "a search that begins too late": Bug(
        "if (begun && candidate >= low) ", "low = candidate + 1;", "low = candidate + 2;"
    ),
    "a search that ends too early": Bug(
        "if (!begun && candidate < high) ", "high = candidate;", "high = candidate - 1;"
    ),
    # Totals and their owners.
    "fp32 sums trusted outside fp32's range": Bug("|| ", "!NeedsWideSum(totals[0])", "true"),
    "the last block's total left out": Bug(
        "args.block_slots, 0, ", "static_cast<int>(gridDim.x)", "static_cast<int>(gridDim.x) - 1"
    ),
    "a segment that ends where the list ends": Bug(
        "FirstChunk(table, args.num_entries, s),\n                                    ",
        "FirstChunk(table, args.num_entries, s + 1)",
        "args.num_chunks",
    ),
    "a slot for each chunk, of which a slot for each warp is read": Bug(
        "if (", "slot < 0 || its != owner", "true"
    ),
    "slots read that no warp has left anything in": Bug(
        "args.owner_slots, first, ", "min(end, first + warp.count)", "end"
    ),
    "one infinite segment of several is no reason to touch nothing": Bug(
        "return ", "WarpTotal(NormKind::kInf, bad) != 0.0", "false"
    ),
    # The table.
    "a gradient listed that counts towards no norm": Bug(
        "(span.numel > 0 && ", "span.segment != kNotCounted", "true"
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
    texts = {path: path.read_text() for path in csrc.glob("cuda/*.cu*")}
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
    for layout in _LAYOUTS:
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
