"""Which backend serves which device, and why another one cannot."""

import os
from dataclasses import dataclass

from fusedclip.backends import cpu, cuda

NAMES = ("reference", "cpu", "cuda", "triton")
_NOT_IN_THIS_VERSION = "not part of this version of fusedclip"


@dataclass(frozen=True)
class Choice:
    """Whose gradients the kernels take; all others are the reference's."""

    take_cpu: bool = False
    take_cuda: bool = False
    only: str | None = None  # the device type that was asked for by name


def available_backends() -> dict[str, str]:
    """Every backend with ``"ok"``, or with the reason why it cannot run here.

    >>> fusedclip.available_backends()["reference"]
    'ok'
    """
    return {
        "reference": "ok",
        "cpu": cpu.problem() or "ok",
        "cuda": cuda.problem() or "ok",
        "triton": _NOT_IN_THIS_VERSION,
    }


def resolve(backend: str) -> Choice:
    """Who serves what for ``backend``.

    ``"auto"`` obeys the environment variable ``FUSEDCLIP_BACKEND``, takes the kernels that can run
    and leaves the rest to the reference. A backend asked for by name that cannot run is an error.
    """
    if backend == "auto":
        backend = os.environ.get("FUSEDCLIP_BACKEND", "auto")
    if backend == "auto":
        return _AUTO_WITH_CUDA if cuda.usable() else _AUTO
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
    return _CPU if backend == "cpu" else _CUDA


_REFERENCE = Choice()
_CPU = Choice(take_cpu=True, only="cpu")
_CUDA = Choice(take_cuda=True, only="cuda")
_AUTO = Choice(take_cpu=cpu.problem() == "")
_AUTO_WITH_CUDA = Choice(take_cpu=cpu.problem() == "", take_cuda=True)
