"""Which backend serves which device, and why another one cannot."""

import os

import torch

from fusedclip.backends import native

NAMES = ("reference", "cpu", "cuda", "triton")
_NOT_IN_THIS_VERSION = "not part of this version of fusedclip"


def available_backends() -> dict[str, str]:
    """Every backend with ``"ok"``, or with the reason why it cannot run here.

    >>> fusedclip.available_backends()["reference"]
    'ok'
    """
    return {
        "reference": "ok",
        "cpu": native.problem or _torch_problem() or "ok",
        "cuda": _NOT_IN_THIS_VERSION,
        "triton": _NOT_IN_THIS_VERSION,
    }


def resolve(backend: str) -> str:
    """The backend to use: ``"reference"`` or ``"cpu"``, where ``"cpu"`` leaves to the reference
    what its kernels cannot take.

    ``"auto"`` obeys the environment variable ``FUSEDCLIP_BACKEND`` and falls back to the reference.
    A backend asked for by name that cannot run is an error.
    """
    if backend == "auto":
        backend = os.environ.get("FUSEDCLIP_BACKEND", "auto")
    if backend == "auto":
        return "cpu" if _CPU_OK else "reference"
    if backend == "reference" or (backend == "cpu" and _CPU_OK):
        return backend
    if backend not in NAMES:
        raise ValueError(
            f"backend: expected one of {('auto', *NAMES)}, got {backend!r}; "
            "fusedclip.available_backends() lists what can run here"
        )
    raise RuntimeError(f"backend {backend!r} cannot run here: {available_backends()[backend]}")


def _torch_problem() -> str:
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return ""
    return f"torch {torch.__version__} has no DLPack exchange API; torch >= 2.10 is needed"


_CPU_OK = available_backends()["cpu"] == "ok"
