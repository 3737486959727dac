"""A module of ``make gpu`` on a GPU that is not there: ``python -m tests.rehearsal MODULE …``.

The emulator's module is in the place of the native one, so that CPU tensors are the GPU's; torch
describes a GPU that is made up; lists are small and rounds few. To be run in the environment that
``tests.emulator.build.environment`` makes.
"""

import tests.emulator.plugin  # noqa: F401, isort: skip, before fusedclip

import importlib
import runpy
import sys
from types import SimpleNamespace

import torch

NAME = "Pretended H100 80GB"
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, multi_processor_count=4, L2_cache_size=1 << 20,
    total_memory=1 << 30, shared_memory_per_multiprocessor=228 << 10,
)  # fmt: skip


def pretend() -> None:
    """To be called before the modules that measure are imported: they take names from these."""
    torch.cuda.get_device_properties = lambda device: PROPERTIES
    for package in ("bench", "fusedclip.bench"):  # the same files under two names
        workloads = importlib.import_module(f"{package}.workloads")
        workloads.GPU_WORKLOADS = [
            workloads.Workload("ResNet-50", lambda: [(21,)]),  # one that the sweep takes
            workloads.Workload("mixed", lambda: [(9, 3), (40,)], (torch.float32, torch.bfloat16)),
        ]
        importlib.import_module(f"{package}.gpu_clock").MIN_ROUNDS = 1


if __name__ == "__main__":
    pretend()
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
