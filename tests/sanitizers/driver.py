"""Compiles ``driver.cpp`` with the CPU kernels under a sanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent

SANITIZERS = ("address,undefined", "thread")
_ISA_FLAGS = {
    "kernels_avx2": "-mavx2 -mf16c -mfma",
    "kernels_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c -mfma",
}


def compile_object(source: Path, csrc: Path, sanitizer: str, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    command = [
        os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g1", "-w", "-ffp-contract=off",
        f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined",
        *_ISA_FLAGS.get(source.stem, "").split(), f"-I{_HERE / 'include'}", f"-I{csrc}",
        "-c", str(source), "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return target


def objects(sanitizer: str, folder: Path) -> dict[str, Path]:
    """The driver and the kernels as they are, by name."""
    csrc = ROOT / "csrc"
    sources = [*sorted(csrc.glob("cpu/*.cpp")), csrc / "aliasing.cpp", _HERE / "driver.cpp"]
    return {source.stem: compile_object(source, csrc, sanitizer, folder) for source in sources}


def run(built: dict[str, Path], sanitizer: str, folder: Path) -> subprocess.CompletedProcess[str]:
    target = folder / "driver"
    compiler = os.environ.get("CXX", "c++")
    linked = [compiler, f"-fsanitize={sanitizer}", *map(str, built.values()), "-pthread"]
    subprocess.run([*linked, "-o", str(target)], check=True)
    return subprocess.run([target], capture_output=True, text=True, errors="replace")


def with_bug(
    built: dict[str, Path], before: str, after: str, sanitizer: str, folder: Path
) -> dict[str, Path]:
    """The same with ``before`` in csrc/cpu/plan.h, clip_cpu.cpp, job.cpp or pool.cpp replaced."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    places = [
        csrc / "cpu" / name
        for name in ("plan.h", "clip_cpu.cpp", "job.cpp", "pool.cpp")
        for _ in range((csrc / "cpu" / name).read_text().count(before))
    ]
    assert len(places) == 1, "the source has changed: plant the bug anew"
    (place,) = places
    place.write_text(place.read_text().replace(before, after))
    source = place if place.suffix == ".cpp" else csrc / "cpu/clip_cpu.cpp"
    return {**built, source.stem: compile_object(source, csrc, sanitizer, folder)}
