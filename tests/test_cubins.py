"""The real compiler's output: no spills, 128-bit accesses, room left beside a block.

Reads the resource report and the disassembly of the module that was built, with the cuobjdump of
the CUDA toolkit or of Triton's package.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusedclip.backends import native

_THREADS = 256
_REGISTERS = 65_536  # of a multiprocessor, on every architecture from sm_70 on
_IN_FLIGHT = 8  # kInFlight
_TABLES = 4  # of three sizes in parameters, and in device memory
_PHASES = ("Measure", "Totals", "Finish", "All")  # of enum class Phase

_ARCHITECTURES = [a for a in native.module.cuda_architectures() if a.startswith("sm_")]

pytestmark = pytest.mark.skipif(
    not _ARCHITECTURES, reason="the module was built without nvcc: it has no machine code for GPUs"
)


@functools.cache
def _cuobjdump(*arguments: str) -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = importlib.util.find_spec("triton")
        assert triton is not None and triton.origin is not None, "cuobjdump comes with triton"
        found = str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    command = [found, *arguments, native.module.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    local: int


@functools.cache
def _resources(architecture: str) -> dict[str, Resources]:
    report = _cuobjdump("-res-usage", "-arch", architecture)
    return _parse(report)


def _parse(report: str) -> dict[str, Resources]:
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {
        name: Resources(int(registers), int(stack), int(local))
        for name, registers, stack, local in re.findall(pattern, report)
    }


@functools.cache
def _code(architecture: str) -> dict[str, str]:
    _, *functions = _cuobjdump("-sass", "-arch", architecture).split("Function : ")
    return {text.split("\n", 1)[0].strip(): text for text in functions}


def _count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", code))


def _phase(name: str) -> str:
    """Of a kernel by its mangled name; empty for the one that writes tables."""
    found = re.search(r"ClipKernel\S*PhaseE(\d)", name)
    return _PHASES[int(found[1])] if found else ""


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_every_kernel_is_there(architecture: str) -> None:
    """For each table: what measures for two norms, the rest once; and the writers of a table."""
    phases = [_phase(name) for name in _resources(architecture)]
    for phase, norms in (("All", 2), ("Measure", 2), ("Totals", 1), ("Finish", 1)):
        assert phases.count(phase) == norms * _TABLES, phase
    assert phases.count("") == len([n for n in _resources(architecture) if "WriteTable" in n]) == 2


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_nothing_is_spilled(architecture: str) -> None:
    for name, used in _resources(architecture).items():
        assert (used.stack, used.local) == (0, 0), name
    for name, code in _code(architecture).items():
        assert _count(code, "LDL") + _count(code, "STL") == 0, name


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_tiles_are_moved_by_128_bits(architecture: str) -> None:
    """As many wide loads as are in flight, for a whole tile and for the last of a chunk, whatever
    the element type; every one past L1, those of a whole tile at fixed distances, under no
    predicate."""
    for name, code in _code(architecture).items():
        phase = _phase(name)
        measures, scales = phase in ("All", "Measure"), phase in ("All", "Finish")
        each = 2 * _IN_FLIGHT
        assert _count(code, r"LDG\.E\.128\S*") == each * (measures + scales), name
        assert _count(code, r"STG\.E\.128\S*") == each * scales, name
        # What is kept in shared memory, and taken from there.
        assert _count(code, r"STS\.128") == each * measures, name
        assert _count(code, r"LDS\.128") == each * scales, name
        assert _whole_tiles(code) == measures + scales, name


def _whole_tiles(code: str) -> int:
    """Runs of loads under no predicate, as many as are in flight, from one address register."""
    load = r"LDG\.E\.128\S* R\d+, (?:desc\[UR\d+\])?\[(R\d+)\.64(?:\+(-?0x[0-9a-f]+))?\]"
    found = [
        re.match(rf"\s+/\*[0-9a-f]+\*/\s+{load}", line)
        for line in code.splitlines()
        if "LDG.E.128" in line
    ]
    places = [(m[1], int(m[2] or "0", 16)) if m else None for m in found]
    runs = 0
    for at in range(len(places) - _IN_FLIGHT + 1):
        run = [place for place in places[at : at + _IN_FLIGHT] if place is not None]
        distances = [distance - run[0][1] for _, distance in run] if run else []
        runs += distances == [512 * k for k in range(_IN_FLIGHT)] and len({r for r, _ in run}) == 1
    return runs


def test_a_tile_with_addresses_of_its_own_is_seen() -> None:
    """The twin: loads under predicates, or from several registers."""
    line = "        /*{:04x}*/    {} LDG.E.128.STRONG.GPU R4, desc[UR8][R{}.64+{:#x}] ;"

    def code(guard: str, register: int) -> str:
        return "\n".join(
            line.format(16 * k, guard, 2 + register * k, 512 * k) for k in range(_IN_FLIGHT)
        )

    assert _whole_tiles(code("", 0)) == 1
    assert _whole_tiles(code("@!P1", 0)) == _whole_tiles(code("", 2)) == 0


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_a_block_leaves_half_of_its_multiprocessor(architecture: str) -> None:
    """Its registers: the twin, without a GPU, of the test beside a long-running kernel."""
    for name, used in _resources(architecture).items():
        assert used.registers * _THREADS <= _REGISTERS // 2, name


def test_the_report_would_show_a_spill() -> None:
    """The twin: what the compiler says of a kernel that spills."""
    report = " Function spilled:\n  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:392\n"
    assert _parse(report) == {"spilled": Resources(registers=255, stack=16, local=8)}
    assert _count("@P0 STL [R1], R2 ;\nSTL.64 [R1+8], R4 ;", "STL") == 2
