"""The fused clip in Triton; installed as ``fusedclip.triton_kernels``.

``table`` lays a list of gradients out as rows of chunks, ``chunks`` is the device code for one
chunk, ``clip`` and ``scale`` are the kernels with their launchers, ``launch`` is what both share.
Importing one of the last four imports Triton; ``fusedclip.backends.triton`` does so at first use.
"""

import functools
import os


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_types() -> tuple[str, ...]:
    """Where the kernels can run; ROCm's devices are called cuda as well."""
    return ("cpu",) if interpreted() else ("cuda", "xpu")
