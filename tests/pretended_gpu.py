"""A GPU that is not there: kernels are compiled for it and launches are written down.

Everything of the Triton backend but the launch itself then runs on a machine without a GPU:
gather, the table, the choice of the specialisation, Triton's compiler and its handle of the kernel.
CPU tensors stand for those of the device.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from fusedclip.triton_kernels import clip, launch, scale
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedclip.backends import triton, triton_gradients

MULTIPROCESSORS = 132
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


@dataclass(frozen=True)
class Launched:
    """One launch: which kernel, with how many programs, on what."""

    kernel: str
    programs: int
    cooperative: bool
    arguments: dict[str, Any]


@dataclass
class PretendedGpu:
    """What Triton asks of a driver, as far as a launch needs it."""

    target: GPUTarget
    launches: list[Launched] = field(default_factory=list)
    refusal: str = ""  # what it says to every cooperative launch

    def __post_init__(self) -> None:
        properties = {"multiprocessor_count": MULTIPROCESSORS, "max_shared_mem": 64 << 10}
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: properties,
            load_binary=lambda name, binary, shared, index: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        cooperative = getattr(metadata, "launch_cooperative_grid", False)

        def run(x: int, y: int, z: int, *details_and_arguments: Any) -> None:
            if cooperative and self.refusal:
                raise RuntimeError(f"Triton Error [CUDA]: {self.refusal}")
            arguments = dict(
                zip(names, details_and_arguments[-len(names) :], strict=True),
            )
            self.launches.append(Launched(source.fn.__name__, x * y * z, cooperative, arguments))

        return run

    @property
    def kernels(self) -> list[Any]:
        """All that was compiled for it."""
        return list(launch._compiled.values())


@contextlib.contextmanager
def pretended_gpu(target: GPUTarget, patch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    gpu = PretendedGpu(target)
    patch.setattr(driver, "_active", gpu)
    for module in (triton, triton_gradients):
        patch.setattr(module, "device_types", lambda: ("cpu",))
    patch.setattr(launch, "_places", {})
    patch.setattr(launch, "_compiled", {})
    for kernel in (clip._clip_kernel, scale._scale_kernel):
        kernel.device_caches.clear()
    yield gpu
    for kernel in (clip._clip_kernel, scale._scale_kernel):
        kernel.device_caches.clear()
