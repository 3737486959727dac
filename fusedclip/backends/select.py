"""Which backend serves which device, and why another one cannot."""

import functools
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from fusedclip.backends import cpu, cuda, native, reference, triton
from fusedclip.triton_kernels import device_types

# By name. A backend is a module with the functions of ``fusedclip.gradients.Backend``, problem and
# device_type, all as the reference has them, and a class of gradients whose ``backend`` it is.
BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
}
NAMES = tuple(BACKENDS)


@dataclass(frozen=True)
class Choice:
    """Which gradients the kernels take; the reference takes all others."""

    take_cpu: bool = False
    cuda_devices: int = 0  # bit i: those on cuda:i
    take_triton: bool = False  # of what the others left
    only: str | None = None  # the backend that was asked for by name

    @property
    def names(self) -> tuple[str, ...]:
        """The backends that serve some gradient, in the order in which they are asked."""
        taking = {
            "cpu": self.take_cpu,
            "cuda": bool(self.cuda_devices),
            "triton": self.take_triton,
            "reference": True,
        }
        return tuple(name for name, takes in taking.items() if takes)

    def refusal(self, device: torch.device) -> str:
        """Why a gradient on ``device`` cannot be served as asked for; empty when it can."""
        if self.only is None:
            return ""
        own = device_types() if self.only == "triton" else (BACKENDS[self.only].device_type(),)
        if device.type not in own:
            return f"it takes gradients on {' and '.join(own)}"
        return cuda.problem_of(device.index or 0) if self.only == "cuda" else ""


def available_backends() -> dict[str, str]:
    """Every backend with ``"ok"``, or with the reason why it cannot run here.

    >>> fusedclip.available_backends()["reference"]
    'ok'
    """
    return {name: backend.problem() or "ok" for name, backend in BACKENDS.items()}


def resolve(backend: str) -> Choice:
    """Which backend serves which gradients, for ``backend`` as users give it.

    ``"auto"`` obeys the environment variable ``FUSEDCLIP_BACKEND``, takes the kernels that can run
    and leaves the rest to the reference. A backend asked for by name that cannot run is an error.
    """
    # Not get(): it takes 0.4 µs to say that a variable is not set.
    if backend == "auto" and "FUSEDCLIP_BACKEND" in os.environ:
        backend = os.environ["FUSEDCLIP_BACKEND"]
    if backend == "auto":
        served = cuda.usable_devices()
        # Triton is slow to start, so usable() is not called where CUDA serves every GPU.
        return _auto(served, not cuda.serves_all(served) and triton.usable(), native.problem)
    if backend == "reference":
        return Choice()
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: expected one of {('auto', *NAMES)}, got {backend!r}; "
            "fusedclip.available_backends() lists what can run here"
        )
    reason = BACKENDS[backend].problem()
    if reason:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    if backend == "cpu":
        return Choice(take_cpu=True, only=backend)
    if backend == "cuda":
        return Choice(cuda_devices=cuda.usable_devices(), only=backend)
    return Choice(take_triton=True, only=backend)


@functools.cache
def _auto(cuda_devices: int, take_triton: bool, native_problem: str) -> Choice:
    """Made once for each state of the machine, of which ``native_problem`` is a part."""
    del native_problem  # a reason that ``cpu.problem`` may give
    return Choice(cpu.problem() == "", cuda_devices, take_triton)
