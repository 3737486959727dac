"""The native module: csrc/python/bindings.cpp, and what it binds.

The module is not there where no compiler was; ``fusedclip.backends.native`` is how to get it. The
comments in csrc/python say more of each function; tests/test_native_types.py compares this file
with the built module.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from fusedclip.gradients import Part
from fusedclip.sharded.placements import Kinds

NONFINITE: list[str]  # the policies for norms that are not finite, by number
GPU_DEVICE_TYPE: str  # "cuda"; "cpu" in the tests' emulator

class GradientList:
    """The gradients of one call on one device."""

    # Set by fusedclip/backends/cpu.py and cuda.py.
    backend: ClassVar[ModuleType]
    device: torch.device
    def __len__(self) -> int: ...
    @property
    def device_index(self) -> int: ...
    @property
    def indices(self) -> list[int]: ...
    @property
    def tensors(self) -> list[Tensor]: ...
    @property
    def has_float64(self) -> bool: ...
    @property
    def has_float16(self) -> bool: ...
    @property
    def has_empty(self) -> bool: ...

class CpuGradients(GradientList):
    def clip_(
        self,
        segments: Tensor | None,
        max_norm: float,
        max_norms: Tensor | None,
        infinity: bool,
        nonfinite: int,
        inv_scale: float,
        threads: int,
        norms: Tensor | None,
        tensor_norms: Tensor | None,
    ) -> tuple[float, bool, bool]: ...
    def measure(
        self, out: Tensor, segments: Tensor | None, infinity: bool, threads: int
    ) -> None: ...
    def scale_(
        self, coefficient: Tensor, segments: Tensor | None, zero_fill: bool, threads: int
    ) -> bool: ...
    def clamp_(self, limit: float, threads: int) -> bool: ...
    def nonfinite_indices(self) -> list[int]: ...

class CudaGradients(GradientList):
    """Only in a build with CUDA."""

    @property
    def stream(self) -> int: ...
    def prepare(
        self, infinity: bool, segments: Tensor | None, num_segments: int, tensor_norms: bool
    ) -> tuple[int, int]: ...
    def table(self) -> bytes: ...
    def write_table(self, table: bytes, to: Tensor) -> None: ...
    def launch(
        self,
        scratch: Tensor,
        table: Tensor | None,
        max_norm: float,
        max_norms: Tensor | None,
        nonfinite: int,
        inv_scale: Tensor | None,
        scale: bool,
        totals: Tensor | None,
        norms: Tensor | None,
        tensor_norms: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...
    def layout(self) -> tuple[int, int, int, int, int]: ...
    def scale_(self, table: Tensor | None, coefficients: Tensor, zero_fill: bool) -> None: ...

class TritonGradients(GradientList):
    """For kernels that Python launches."""

    @property
    def spans(self) -> bytes: ...
    @property
    def total_bytes(self) -> int: ...

def gather(
    tensors: Sequence[Tensor],
    from_parameters: bool,
    deduplicate: bool,
    take_cpu: bool,
    cuda_devices: int,
    triton_devices: int,
    dtensor_type: type | None,
) -> tuple[list[Part], list[tuple[int, Tensor]], Kinds | None]:
    """(the gradients that kernels take, by device; what none takes; kinds of DTensors)."""

def plain_clip(
    max_norm: float,
    infinity: bool,
    nonfinite: int,
    from_parameters: bool,
    take_cpu: bool,
    problem: Callable[[], str] | None,
    cuda_devices: Callable[[], int],
    memory: Callable[[int, int, int, bool], tuple[Tensor, Tensor]],
    triton_devices: Callable[[], int],
    clip_by_triton: Callable[[TritonGradients], Tensor],
) -> Callable[[Sequence[Tensor]], Tensor | tuple[Tensor, list[Tensor]] | None]: ...
def cpu_isa() -> str: ...
def cuda_architectures() -> list[str]: ...
