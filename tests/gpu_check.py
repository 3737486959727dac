"""Is it right at all? ``python -m tests.gpu_check``: seconds, before anything is timed.

Fresh random lists against fp64, by both backends: every dtype, long tables, the infinity norm,
clipped and not. A line for each; exit status 1 when one is wrong.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import fusedclip
from bench.gpu_device import tensors_of
from tests.helpers import ELEMENT_ATOL, ELEMENT_RTOL, FLOAT_DTYPES, NORM_RTOL, parameters

_CHUNK = 1 << 24  # elements that are compared at a time


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the largest tensor")
    parser.add_argument("--tensors", type=int, default=3000, help="of the longest list")
    arguments = parser.parse_args(argv)
    device = tensors_of("cuda")
    available = fusedclip.available_backends()
    status = 0
    for backend in ("cuda", "triton"):
        if available[backend] != "ok":
            print(f"FAIL {backend}: {available[backend]}")
            status = 1
            continue
        for name, grads in _lists(device, arguments.elements, arguments.tensors):
            for order in (2.0, math.inf):
                for bites in (False, True):
                    wrong = difference(grads, order, bites, backend)
                    what = f"{backend}, {name}, order {order}, {'' if bites else 'not '}clipped"
                    print(f"FAIL {what}: {wrong}" if wrong else f"ok   {what}", flush=True)
                    status |= bool(wrong)
    return status


def _lists(device: torch.device, elements: int, tensors: int) -> list[tuple[str, list[Tensor]]]:
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**63)

    def random(numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device).normal_(generator=generator)

    return [
        ("all dtypes", [random(n, d) for d in FLOAT_DTYPES for n in (1, 1027, elements // 64)]),
        (f"{tensors:,} tensors", [random(1 + i % 97, torch.bfloat16) for i in range(tensors)]),
        (f"1 tensor of {elements:,}", [random(elements, torch.bfloat16)]),
    ]


def difference(grads: Sequence[Tensor], order: float, bites: bool, backend: str) -> str:
    """Empty, or what is wrong with a clip of copies of ``grads``."""
    each = torch.stack([torch.linalg.vector_norm(g.double(), order) for g in grads])
    exact = float(torch.linalg.vector_norm(each, order))
    max_norm = exact * (0.5 if bites else 2.0)
    clipped = parameters(*(g.clone() for g in grads))
    norm = float(fusedclip.clip_(clipped, max_norm, order, backend=backend))
    rtol = NORM_RTOL[torch.float32]
    if not abs(norm - exact) <= rtol * exact:
        return f"expected a norm of {exact:.9g}, got {norm:.9g}"
    factor = min(1.0, max_norm / (exact + 1e-6))
    for index, (before, parameter) in enumerate(zip(grads, clipped, strict=True)):
        assert parameter.grad is not None
        for old, new in zip(before.split(_CHUNK), parameter.grad.split(_CHUNK), strict=True):
            wanted, dtype = old.double() * factor, old.dtype
            # In a mixed list fp64 gradients are scaled by a norm with the exactness of fp32.
            close = torch.isclose(
                new.double(), wanted, ELEMENT_RTOL[dtype] + rtol, ELEMENT_ATOL[dtype]
            )
            if not bool(close.all()):
                return f"grads[{index}] ({dtype}, {before.numel():,} elements) is scaled wrongly"
    return ""


if __name__ == "__main__":
    sys.exit(main())
