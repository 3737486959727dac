"""The GPU as it was found: what it is, driver and compiler, clocks; whatever of it can be asked."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedclip.backends import cuda, native

_CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.max.mem": "memory_max_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str
    multiprocessors: int
    shared_kib: int  # of a multiprocessor
    l2_bytes: int
    memory_bytes: int
    cuda: str | None  # that torch was built with
    triton: str | None
    driver: str | None
    nvcc: str | None
    architectures: tuple[str, ...]  # of the native module


def tensors_of(name: str) -> torch.device:
    """``name`` as a device; where the native module is the emulator its tensors are the CPU's."""
    device = torch.device(name)
    if device.type != "cuda" or cuda.device_type() == "cuda":
        return device
    return torch.device(cuda.device_type())


def describe(device: torch.device) -> Gpu:
    own = torch.cuda.get_device_properties(device)
    module = native.module
    return Gpu(
        name=own.name,
        capability=f"{own.major}.{own.minor}",
        multiprocessors=own.multi_processor_count,
        shared_kib=getattr(own, "shared_memory_per_multiprocessor", 0) >> 10,
        l2_bytes=own.L2_cache_size,
        memory_bytes=own.total_memory,
        cuda=torch.version.cuda,
        triton=_triton(),
        driver=_smi(["driver_version"], device)[0],
        nvcc=_nvcc(),
        architectures=() if module is None else tuple(module.cuda_architectures()),
    )


def clocks(device: torch.device) -> dict[str, float]:
    """In MHz, with heat and power: what nvidia-smi answers now; empty where there is none."""
    found = {}
    for name, answer in zip(_CLOCKS.values(), _smi(list(_CLOCKS), device), strict=True):
        try:
            found[name] = float(answer or "")
        except ValueError:  # "[N/A]"
            continue
    return found


def _smi(questions: Sequence[str], device: torch.device) -> Sequence[str | None]:
    for name in _smi_names(device):
        command = ["nvidia-smi", f"--query-gpu={','.join(questions)}", f"--id={name}"]
        answer = _output([*command, "--format=csv,noheader,nounits"])
        fields = [] if answer is None else [field.strip() for field in answer.split(",")]
        if len(fields) == len(questions):
            return fields
    return [None] * len(questions)


def _smi_names(device: torch.device) -> list[str]:
    """nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves: by name, then."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    names = [] if uuid is None else [f"GPU-{uuid}"]
    return [*names, str(device.index or 0)]


def _nvcc() -> str | None:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    text = None if found is None else _output([found, "--version"])
    release = re.search(r"release [\d.]+, V([\d.]+)", text or "")
    return release.group(1) if release else None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _output(command: Sequence[str]) -> str | None:
    """What it prints; None when it cannot be run, fails or takes more than ten seconds."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
