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
from tests.helpers import FLOAT_DTYPES

_THREADS = 256
_REGISTERS = 65_536  # of a multiprocessor, on every architecture from sm_70 on
_DTYPES = len(FLOAT_DTYPES)
_READS, _SCALES = 8, 4  # in flight: kReadsInFlight, kScalesInFlight

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


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_every_kernel_is_there(architecture: str) -> None:
    """ClipKernel for two norms and two kinds of table, ScaleKernel for the tables, the writer."""
    names = _resources(architecture)
    assert len([n for n in names if "ClipKernel" in n]) == 4
    assert len([n for n in names if "ScaleKernel" in n]) == 2
    assert len([n for n in names if "WriteTableKernel" in n]) == 1


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_nothing_is_spilled(architecture: str) -> None:
    for name, used in _resources(architecture).items():
        assert (used.stack, used.local) == (0, 0), name
    for name, code in _code(architecture).items():
        assert _count(code, "LDL") + _count(code, "STL") == 0, name


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_hot_loops_move_128_bits(architecture: str) -> None:
    """As many wide loads as are in flight, for each element type; every one past L1."""
    for name, code in _code(architecture).items():
        measures, scales = "ClipKernel" in name, "ClipKernel" in name or "ScaleKernel" in name
        loads = _DTYPES * (_READS * measures + _SCALES * scales)
        assert _count(code, r"LDG\.E\.128\S*") == loads, name
        assert _count(code, r"STG\.E\.128\S*") == _DTYPES * _SCALES * scales, name
        # What is kept in shared memory, and taken from there.
        assert _count(code, r"STS\.128") == _DTYPES * _READS * measures, name


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
