"""The lists of gradients that are measured: synthetic extremes and the shapes of real models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from math import prod

import torch
from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    name: str
    make_shapes: Callable[[], list[Shape]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # taken in turn

    @cached_property
    def shapes(self) -> list[Shape]:
        return self.make_shapes()

    @property
    def elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self._tensors())

    @property
    def dtype_name(self) -> str:
        return " + ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)

    def parameters(self, device: torch.device) -> list[nn.Parameter]:
        """Parameters with normally distributed gradients: never zeros, never one value."""
        generator = torch.Generator(device).manual_seed(0)
        made = []
        for shape, dtype in self._tensors():
            p = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            p.grad = torch.empty_like(p).normal_(generator=generator)
            made.append(p)
        return made

    def _tensors(self) -> Iterator[tuple[Shape, torch.dtype]]:
        return zip(self.shapes, cycle(self.dtypes), strict=False)


def resnet50() -> list[Shape]:
    """161 tensors, 25,557,032 elements. Source: He et al. 2015, arXiv 1512.03385, table 1."""

    def convolution(out: int, into: int, size: int) -> list[Shape]:  # with its batch norm
        return [(out, into, size, size), (out,), (out,)]

    shapes = convolution(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, channels, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def gpt2_small() -> list[Shape]:
    """148 tensors, 124,439,808 elements, the head tied to the embedding. Source: Radford 2019."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    block = [
        *norm, (width, 3 * width), (3 * width,), (width, width), (width,),
        *norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(50257, width), (1024, width), *(12 * block), *norm]


def llama_projections(scale: int = 1) -> list[Shape]:
    """A layer's seven linear maps in Llama-2 7B. Source: Touvron et al. 2023, arXiv 2307.09288."""
    width, hidden = 4096 // scale, 11008 // scale
    return [*(4 * [(width, width)]), (hidden, width), (hidden, width), (width, hidden)]


def llama_7b(scale: int = 8) -> list[Shape]:
    """The 291 tensors of Llama-2 7B, each dimension of a layer divided by ``scale``."""
    width = 4096 // scale
    layer = [*llama_projections(scale), (width,), (width,)]
    return [(32000, width), *(32 * layer), (width,), (32000, width)]


def lora_7b(rank: int = 16) -> list[Shape]:
    """LoRA of ``rank`` on every linear map of Llama-2 7B: 448 tensors, full size.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    return [
        shape for out, into in 32 * llama_projections() for shape in ((rank, into), (out, rank))
    ]


def equal(count: int, elements: int, dtype: torch.dtype = torch.float32) -> Workload:
    shape: Shape = (elements,)
    return Workload(f"{count:,} × {elements:,}", lambda: count * [shape], (dtype,))


def matrices(count: int, elements: int) -> list[Shape]:
    """``count`` matrices of 512 columns and 1 to about twice the mean rows, ``elements`` in all.

    The mix of 225,181,696 elements in 500 matrices is that of NVIDIA-NeMo/Automodel#3685, the
    shapes are not published there.
    """
    columns = 512
    mean = elements // columns // count
    # In pairs of few and many.
    rows = [mean + (1 if i % 2 else -1) * (i // 2 * 7919 % mean) for i in range(count - 1)]
    rest = elements - columns * sum(rows)
    return [*((r, columns) for r in rows), (rest // columns, columns)]


WORKLOADS = [
    equal(300, 333_333),
    equal(300, 333_333, torch.bfloat16),
    equal(300, 333_333, torch.float16),
    equal(1000, 1024),
    equal(300, 16),
    Workload("ResNet-50", resnet50),
    Workload("GPT-2 small", gpt2_small),
    Workload("Llama-2 7B, width ÷ 8", llama_7b, (torch.bfloat16,)),
    Workload("LoRA r=16 of 7B", lora_7b),
]

GPU_WORKLOADS = [
    equal(300, 16),
    equal(1000, 1024),
    Workload("ResNet-50", resnet50),
    Workload("LoRA r=16 of 7B", lora_7b, (torch.bfloat16,)),
    Workload("500 matrices", lambda: matrices(500, 225_181_696), (torch.float32, torch.bfloat16)),
    equal(1, 1_536_066_816, torch.bfloat16),
    Workload("Llama-2 7B", lambda: llama_7b(scale=1), (torch.bfloat16,)),
]
