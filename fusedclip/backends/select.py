"""Which backend serves which device, and why another one cannot."""

import os
from dataclasses import dataclass

from fusedclip.backends import cpu, cuda, triton
from fusedclip.triton_kernels import device_types

NAMES = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Choice:
    """Whose gradients the kernels take; all others are the reference's."""

    take_cpu: bool = False
    take_cuda: bool = False
    take_triton: bool = False  # of what the others left
    name: str = "auto"
    only: tuple[str, ...] = ()  # the device types of a backend that was asked for by name


def available_backends() -> dict[str, str]:
    """Every backend with ``"ok"``, or with the reason why it cannot run here.

    >>> fusedclip.available_backends()["reference"]
    'ok'
    """
    return {
        "reference": "ok",
        "cpu": cpu.problem() or "ok",
        "cuda": cuda.problem() or "ok",
        "triton": triton.problem() or "ok",
    }


def resolve(backend: str) -> Choice:
    """Who serves what for ``backend``.

    ``"auto"`` obeys the environment variable ``FUSEDCLIP_BACKEND``, takes the kernels that can run
    and leaves the rest to the reference. A backend asked for by name that cannot run is an error.
    """
    if backend == "auto":
        backend = os.environ.get("FUSEDCLIP_BACKEND", "auto")
    if backend == "auto":
        if cuda.usable():
            return _AUTO_WITH_CUDA
        return _AUTO_WITH_TRITON if triton.usable() else _AUTO
    if backend == "reference":
        return _REFERENCE
    if backend not in NAMES:
        raise ValueError(
            f"backend: expected one of {('auto', *NAMES)}, got {backend!r}; "
            "fusedclip.available_backends() lists what can run here"
        )
    reason = available_backends()[backend]
    if reason != "ok":
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return {"cpu": _CPU, "cuda": _CUDA, "triton": _TRITON}[backend]


_REFERENCE = Choice()
_CPU = Choice(take_cpu=True, name="cpu", only=("cpu",))
_CUDA = Choice(take_cuda=True, name="cuda", only=("cuda",))
_TRITON = Choice(take_triton=True, name="triton", only=device_types())
_AUTO = Choice(take_cpu=cpu.problem() == "")
_AUTO_WITH_CUDA = Choice(take_cpu=cpu.problem() == "", take_cuda=True)
_AUTO_WITH_TRITON = Choice(take_cpu=cpu.problem() == "", take_triton=True)
