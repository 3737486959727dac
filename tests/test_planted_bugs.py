"""What the emulator would catch: each bug below, planted into the kernels, fails its driver.

``tests/emulator/driver.cu`` checks every path of csrc/cuda against fp64; here it is compiled with
the emulator and AddressSanitizer, once with the kernels as they are and once for each bug.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_EMULATOR = _ROOT / "tests" / "emulator"

# (what is planted, the line as it is, the line as it would be)
BUGS = {
    "no barrier before a block's totals are read": (
        "warp_totals[threadIdx.x / kWarp] = value;\n  __syncthreads();",
        "warp_totals[threadIdx.x / kWarp] = value;",
    ),
    "no barrier after they were read": (
        "  __syncthreads();  // the readers of the last call are done\n",
        "",
    ),
    "no barrier of the grid": ("  cooperative_groups::this_grid().sync();\n", ""),
    "a chunk that runs past its gradient": (
        "cut + chunk_bytes < data_end ? cut + chunk_bytes : data_end",
        "cut + chunk_bytes",
    ),
    "a chunk that ends early": (
        "static_cast<int>(tail - vectors) / 16,",
        "static_cast<int>(tail - vectors) / 16 - 1,",
    ),
    "a dropped tail": ("if (i >= chunk.num_head + chunk.num_tail)", "if (i >= chunk.num_head)"),
    "stale residency: the first chunks' places taken for the last": (
        "const int slot = k - (num_mine - args.resident_chunks);",
        "const int slot = args.resident_chunks == 0 ? -1 : k % args.resident_chunks;",
    ),
    "a gradient measured that counts towards no norm": (
        "if (table[entry].segment() != kNotCounted) {",
        "if (true) {",
    ),
    "a gradient scaled that counts towards no norm": (
        "    if (entry.segment() == kNotCounted) continue;\n",
        "",
    ),
    "fp32 sums trusted outside fp32's range": ("!NeedsWideSum(totals[0])", "true"),
    "a segment that ends where the list ends": (
        "FirstChunk(table, args, segment + 1)",
        "args.num_chunks",
    ),
    "the look-up of a chunk ignores where it was": (
        "FindEntry(table, entry, args.num_entries, chunk);\n    if (table[entry].segment() !=",
        "FindEntry(table, entry, entry + 1, chunk);\n    if (table[entry].segment() !=",
    ),
    "a table with a hole between its parts": ("if (i < count)", "if (i < count - 1)"),
}


def _compile(folder: Path, csrc: Path, source: Path) -> Path:
    target = folder / f"{source.stem}.o"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g1", "-w", "-fno-strict-aliasing", "-fsanitize=address",
         f"-I{_EMULATOR / 'include'}", f"-I{csrc}", "-x", "c++", "-c", source, "-o", target],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The parts that no bug changes."""
    folder = tmp_path_factory.mktemp("driver")
    csrc = _ROOT / "csrc"
    unchanged = [_EMULATOR / "emulator.cpp", _EMULATOR / "driver.cu"]
    return [
        _compile(folder, csrc, source) for source in [*unchanged, csrc / "cuda/launch_shape.cpp"]
    ]


def _failures(objects: list[Path], folder: Path, before: str, after: str) -> str:
    """What the driver says of the kernels with ``before`` replaced; empty when it is content."""
    csrc = folder / "csrc"
    shutil.copytree(_ROOT / "csrc", csrc)
    places = [
        path for path in csrc.glob("cuda/*.cuh") for _ in range(path.read_text().count(before))
    ]
    assert len(places) == 1, "the kernels have changed: plant the bug anew"
    places[0].write_text(places[0].read_text().replace(before, after))
    kernels = _compile(folder, csrc, csrc / "cuda/clip_cuda.cu")
    driver = folder / "driver"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-fsanitize=address", *objects, kernels, "-o", driver], check=True)
    for layout in ("64,3,1024,2", "32,2,512,1"):
        run = subprocess.run(
            [driver],
            env={**os.environ, "FUSEDCLIP_CUDA_LAYOUT": layout},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if run.returncode != 0:
            return run.stdout + run.stderr or f"exit status {run.returncode}"
    return ""


def test_the_kernels_as_they_are(objects: list[Path], tmp_path: Path) -> None:
    assert _failures(objects, tmp_path, "  MeasureMine<kKind>(", "  MeasureMine<kKind>(") == ""


@pytest.mark.parametrize("bug", BUGS)
def test_is_caught(objects: list[Path], tmp_path: Path, bug: str) -> None:
    assert _failures(objects, tmp_path, *BUGS[bug])
