"""How exact norms and rescaled elements are, beside torch's: ``python -m bench.accuracy``.

Gradients of many sizes, dtypes and magnitudes, clipped to a third of their norm. The truth is fp64:
the norm of the values as they are, and each element times the exact coefficient. Backends that need
an environment of their own (the CUDA kernels in the tests' emulator, Triton's interpreter) run in
processes of their own, where the source tree has them.
"""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .section import Section, conditions, main

_ROOT = Path(__file__).parent.parent

_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}

# What the type holds with room for the elements of a large tensor.
_MAGNITUDES = {
    torch.float32: (1e-30, 1e-10, 1.0, 1e10, 1e30),
    torch.float64: (1e-100, 1.0, 1e100),
    torch.float16: (1e-4, 1.0, 1e3),
    torch.bfloat16: (1e-30, 1.0, 1e30),
}
_SIZES = ((1,), (17,), (1000,), (70_001,), (400_000,), (3, 70_001, 17, 1000))
_SMALL_SIZES = ((1,), (17,), (1000,), (9_001,), (3, 4_001, 17, 1000))
_SEEDS = 3


@dataclass(frozen=True)
class Row:
    """Relative errors over all lists of one kind; NaN: no product is a normal number."""

    backend: str
    dtype: str
    magnitude: float
    norm_max: float
    norm_median: float
    element_max: float
    element_median: float  # of the lists' largest
    lists: int


Clip = Callable[[Sequence[nn.Parameter], float], Tensor]


def measure(seconds: float) -> dict[str, Any]:
    """All backends, in processes of their own; the number of lists does not go by ``seconds``."""
    del seconds
    where = conditions()
    rows = [row for name in _backends() for row in _in_a_process(name, _SEEDS)]
    return {"environment": where, "rows": [dataclasses.asdict(row) for row in rows]}


def _one_backend(backend: str, seeds: int) -> None:
    """What a process of ``_in_a_process`` does."""
    rows = measure_backend(backend, seeds)
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


def measure_backend(backend: str, seeds: int) -> list[Row]:
    """Every dtype and magnitude by one backend, or by ``"torch"``."""
    clip = _clip_of(backend)
    slow = backend in ("cuda", "triton")
    sizes = _SMALL_SIZES if slow else _SIZES
    return [
        _row(backend, clip, dtype, magnitude, sizes, seeds)
        for dtype, magnitudes in _MAGNITUDES.items()
        for magnitude in magnitudes
    ]


def _clip_of(backend: str) -> Clip:
    if backend == "torch":
        return nn.utils.clip_grad_norm_
    import fusedclip

    if fusedclip.available_backends()[backend] != "ok":
        raise RuntimeError(f"{backend}: {fusedclip.available_backends()[backend]}")
    if backend == "triton":
        importlib.import_module("tests.interpreter").improve()
    return lambda params, limit: fusedclip.clip_(params, limit, backend=backend)


def _row(
    backend: str,
    clip: Clip,
    dtype: torch.dtype,
    magnitude: float,
    sizes: Sequence[Sequence[int]],
    seeds: int,
) -> Row:
    norms, elements = [], []
    for seed in range(seeds):
        for size in sizes:
            norm, element = _errors(clip, dtype, magnitude, size, seed)
            norms.append(norm)
            elements.append(element)
    return Row(
        backend, _NAMES[dtype], magnitude, _largest(norms), _median(norms),
        _largest(elements), _median(elements), len(norms),
    )  # fmt: skip


def _errors(
    clip: Clip, dtype: torch.dtype, magnitude: float, sizes: Sequence[int], seed: int
) -> tuple[float, float]:
    """Of the norm, and the largest of an element, for one list."""
    generator = torch.Generator().manual_seed(seed)
    grads = [
        (torch.randn(n, dtype=torch.float64, generator=generator) * magnitude).to(dtype)
        for n in sizes
    ]
    truth = _norm(grads)
    limit = truth / 3  # no power of 2, by which every product would be exact
    params = []
    for grad in grads:
        p = nn.Parameter(torch.zeros_like(grad))
        p.grad = grad.clone()
        params.append(p)
    norm = float(clip(params, limit))
    factor = limit / (truth + 1e-6)
    worst = math.nan
    for p, grad in zip(params, grads, strict=True):
        assert p.grad is not None
        wanted = grad.double() * min(factor, 1.0)
        # Where the product is a normal number of the type: below, its spacing is constant.
        normal = wanted.abs() >= torch.finfo(dtype).tiny
        error = ((p.grad.double() - wanted).abs() / wanted.abs())[normal]
        if error.numel():
            largest = float(error.max())
            worst = largest if math.isnan(worst) else max(worst, largest)
    return abs(norm - truth) / truth, worst


def _norm(grads: Sequence[Tensor]) -> float:
    values = torch.cat([g.double() for g in grads])
    largest = float(values.abs().max())
    return largest * math.sqrt(float((values / largest).square().sum()))


def _largest(values: Sequence[float]) -> float:
    return max((v for v in values if not math.isnan(v)), default=math.nan)


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmedian())


def _backends() -> dict[str, dict[str, str]]:
    """Each by name, with the environment of its process."""
    found: dict[str, dict[str, str]] = {"torch": {}, "reference": {}, "cpu": {}}
    if (_ROOT / "tests" / "emulator").is_dir():
        build = importlib.import_module("tests.emulator.build")
        layout = {"FUSEDCLIP_CUDA_LAYOUT": "64,3,4096,16384,1"}
        found["cuda"] = build.environment(build.build(), **layout)
        found["triton"] = {"TRITON_INTERPRET": "1"}
    return found


def _in_a_process(backend: str, seeds: int) -> list[Row]:
    call = f"from bench.accuracy import _one_backend; _one_backend({backend!r}, {seeds})"
    if backend == "cuda":
        call = "import tests.emulator.plugin; " + call  # before fusedclip
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", call],
        env={**os.environ, **_backends()[backend]},
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Row(**row) for row in json.loads(run.stdout)]


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A line for each dtype and magnitude: the largest error, and the typical one behind it."""
    rows = [Row(**row) for row in result["rows"]]
    backends = list(dict.fromkeys(row.backend for row in rows))
    lines = ["| gradients | error of | " + " | ".join(backends) + " |"]
    lines.append("|---|---|" + "---|" * len(backends))
    by_key = {(row.backend, row.dtype, row.magnitude): row for row in rows}
    for dtype, magnitude in dict.fromkeys((row.dtype, row.magnitude) for row in rows):
        own = [by_key[backend, dtype, magnitude] for backend in backends]
        norms = " | ".join(f"{_error(r.norm_max)} ({_error(r.norm_median)})" for r in own)
        elements = " | ".join(f"{_error(r.element_max)} ({_error(r.element_median)})" for r in own)
        lines.append(f"| {dtype}, {magnitude:.0e} | norm | {norms} |")
        lines.append(f"| | elements | {elements} |")
    lines += [
        "",
        "Largest relative error over lists of 1 to 400,000 elements (10,000 for cuda and triton, "
        "which run emulated and interpreted on the CPU), in brackets the median; torch "
        f"{result['environment']['torch']}. An error of 1 is a norm of 0 or gradients that became "
        "0; -: all rescaled elements are below the type's normal range.",
    ]
    return {"accuracy": "\n".join(lines) + "\n"}


def _error(value: float) -> str:
    if value == 0.0:
        return "0"
    return "inf" if math.isinf(value) else "-" if math.isnan(value) else f"{value:.0e}"


SECTION = Section("accuracy", measure, tables)

if __name__ == "__main__":
    sys.exit(main(SECTION, __doc__))
