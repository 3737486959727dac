"""What a gradient can be: dtypes, layouts, views, and tensors that are not plain."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.masked import masked_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only

from tests.under_torch.steps import IN_A_ROW, MAX_NORM, TORCHS, Step, held


@dataclass(frozen=True)
class Kind:
    """Two gradients or more of a kind, of norm 13 · scale where nothing else is natural.

    Args:
        around: what must be set up while they live.
        norm_type, foreach, holder, early, readable: of the ``Step``.
        differs: the row of the README's table of differences that is about them.
        meant: step → a function of the same gradients that does what that row promises, by torch's
            functions; what fusedclip is compared with where it differs from torch on purpose.
    """

    make: Callable[[float], list[Any]]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    norm_type: float = 2.0
    foreach: bool | None = None
    holder: Callable[[Tensor], Any] = held
    early: bool = False
    readable: Callable[[Tensor], Tensor] | None = None
    differs: str | None = None
    meant: Callable[[Step], Callable[..., Sequence[Any]]] = lambda step: step


def plain(scale: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    values = [[3.0, 4.0], [0.0, 12.0]]
    return [torch.tensor(v, dtype=torch.float64).mul(scale).to(dtype) for v in values]


def each(function: Callable[[Tensor], Any]) -> Callable[[float], list[Any]]:
    return lambda scale: [function(grad) for grad in plain(scale)]


class FunctionSubclass(Tensor):
    """The simplest subclass there is: its results are of its type."""


class OneComponent(Tensor):
    """A wrapper that does every operation on the tensor inside."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> "OneComponent":
        made: OneComponent = Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), dtype=elem.dtype, device=elem.device
        )
        made.elem = elem
        return made

    def __repr__(self) -> str:  # torch's own would run operations
        return f"OneComponent({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(OneComponent, lambda t: t.elem, (args, kwargs or {}))
        results = func(*args, **kwargs)
        return tree_map_only(Tensor, OneComponent, results)


class Doubled(OneComponent):
    """Its values are twice those inside, which whoever looks inside gets wrong."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = tree_map_only(OneComponent, lambda t: t.elem * 2, (args, kwargs))
        results = func(*inside[0], **inside[1])
        if func._schema.is_mutable:
            written, new = args[0], inside[0][0]
            pairs = (
                zip(written, new, strict=True) if isinstance(written, list) else [(written, new)]
            )
            for wrapper, value in pairs:
                wrapper.elem.copy_(value / 2)
            return args[0]
        return tree_map_only(Tensor, lambda t: Doubled(t / 2), results)


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def four_pretended_ranks() -> Iterator[None]:
    """Collectives that do nothing: as if only this rank's shards had values."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(shape: Sequence[int], placements: Sequence[Any]) -> Callable[[float], list[Any]]:
    def make(scale: float) -> list[DTensor]:
        names = ("a", "b")[: len(shape)]
        mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)
        local = [grad.reshape(1, 2) for grad in plain(scale)]
        return [DTensor.from_local(grad, mesh, placements) for grad in local]

    return make


def some_sharded(scale: float) -> list[Tensor]:
    first, second = plain(scale)
    return [distribute_tensor(first, init_device_mesh("cpu", (1,)), [Shard(0)]), second]


def of_two_meshes(scale: float) -> list[Tensor]:
    first, second = plain(scale)
    line, square = init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1))
    return [
        distribute_tensor(first, line, [Shard(0)]),
        distribute_tensor(second, square, [Shard(0), Replicate()]),
    ]


def carries_graph(grad: Tensor) -> Tensor:
    """As ``backward(create_graph=True)`` leaves it."""
    weight = torch.ones_like(grad).requires_grad_()
    (made,) = torch.autograd.grad((weight**2 * grad / 2).sum(), weight, create_graph=True)
    return made


def inference(grad: Tensor) -> Tensor:
    with torch.inference_mode():
        return grad.clone()


def sparse(grad: Tensor) -> Tensor:
    """Two entries for one element, which add up."""
    indices, values = [[0, 0, 1]], [grad[0] / 4, grad[0] * 0.75, grad[1]]
    return torch.sparse_coo_tensor(indices, torch.stack(values), (2,), check_invariants=True)


def sliding(grad: Tensor) -> Tensor:
    """Windows that share elements."""
    return torch.cat([grad, grad]).unfold(0, 2, 1)


def twice(scale: float) -> list[Tensor]:
    first, second = plain(scale)
    return [first, second, first]


def partly_overlapping(scale: float) -> list[Tensor]:
    whole = torch.tensor([3.0, 4.0, 12.0]) * scale
    return [whole[:2], whole[1:]]


def in_float32(step: Step) -> Callable[..., Sequence[Any]]:
    """The norm is float32, and each product is rounded once."""

    def meant(*grads: Tensor) -> Sequence[Any]:
        wide = step(*[grad.float() for grad in grads])
        norm = wide[: len(wide) - len(grads)]
        with torch.no_grad():
            for old, new in zip(grads, wide[len(norm) :], strict=True):
                old.copy_(new)
        return *norm, *grads

    return meant


def scaled_once(step: Step) -> Callable[..., Sequence[Any]]:
    """What only reads counts a gradient as often as it is listed; a clip takes it once."""

    def meant(first: Tensor, second: Tensor, again: Tensor) -> Sequence[Any]:
        if step.function == "get_total_norm":
            return step(first, second, again)
        if step.function in ("clip_grad_norm_", "clip_grad_value_"):
            *norm, new_first, new_second = step(first, second)
        else:
            total = TORCHS["get_total_norm"]([first, second, again])
            TORCHS["clip_grads_with_norm_"]([held(first), held(second)], MAX_NORM, total)
            norm = [total] if step.function == IN_A_ROW else []
            new_first, new_second = first, second
        return *norm, new_first, new_second, new_first

    return meant


def refused_if_written(step: Step) -> Callable[..., Sequence[Any]]:
    """Only clamping twice does no harm."""

    def meant(*grads: Tensor) -> Sequence[Any]:
        if step.function not in ("get_total_norm", "clip_grad_value_"):
            raise ValueError
        return step(*grads)

    return meant


def stored(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def by_values(step: Step) -> Callable[..., Sequence[Any]]:
    """The norm is that of the values that are stored, once those of one element are summed."""

    def meant(*grads: Tensor) -> Sequence[Any]:
        if step.function == "clip_grad_value_":
            return step(*grads)
        summed = [grad.coalesce() if grad.is_sparse else grad for grad in grads]
        results = step(*[stored(grad) for grad in summed])
        norm = results[: len(results) - len(grads)]
        return *norm, *[
            torch.sparse_coo_tensor(old.indices(), new, old.shape) if old.is_sparse else new
            for old, new in zip(summed, results[len(norm) :], strict=True)
        ]

    return meant


def local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def of_all_meshes(step: Step) -> Callable[..., Sequence[Any]]:
    """One norm of all, a plain tensor; of one rank the local tensors are the whole."""

    def meant(*grads: Tensor) -> Sequence[Any]:
        results = step(*[local(grad) for grad in grads])  # which writes them in place
        return *results[: len(results) - len(grads)], *grads

    return meant


def nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    return lambda grad: torch.nested.nested_tensor([grad, grad[:1]], layout=layout)


def detached_holder(grad: Tensor) -> Tensor:
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    return p


def object_holder(grad: Tensor) -> Any:
    return SimpleNamespace(grad=grad)


def negated(grad: Tensor) -> Tensor:
    """A view of memory that holds the negative of its values."""
    return torch.complex(grad, -grad).conj().imag


def not_contiguous(grad: Tensor) -> Tensor:
    return torch.stack([grad, grad])[:, 0]


NORM_TYPES = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf, -math.inf, -1.0)
HALF_NORMS = "norm of bf16 / fp16 gradients"
SPARSE = "sparse COO gradients on the CPU"
SEVERAL_MESHES = "DTensors of several meshes, or with plain tensors, in one list"

PLAIN = Kind(plain)
KINDS: dict[str, Kind] = {
    "nn.Parameter": Kind(plain, holder=detached_holder),
    "object with .grad": Kind(plain, holder=object_holder),
    "gradient is nn.Parameter": Kind(each(nn.Parameter)),
    "float64": Kind(lambda scale: plain(scale, torch.float64)),
    "bfloat16": Kind(
        lambda scale: plain(scale, torch.bfloat16), differs=HALF_NORMS, meant=in_float32
    ),
    "float16": Kind(
        lambda scale: plain(scale, torch.float16), differs=HALF_NORMS, meant=in_float32
    ),
    "bfloat16, imported by name": Kind(lambda scale: plain(scale, torch.bfloat16), early=True),
    "complex64": Kind(lambda scale: plain(scale, torch.complex64)),
    "float32, float64": Kind(lambda s: [plain(s)[0], plain(s, torch.float64)[1]]),
    "int64": Kind(lambda scale: plain(scale, torch.int64)),
    "bool": Kind(lambda scale: plain(scale, torch.bool)),
    "float8": Kind(lambda scale: plain(scale, torch.float8_e4m3fn)),
    "quantized": Kind(
        each(lambda g: torch.quantize_per_tensor(g, 0.1, 0, torch.qint8)), holder=object_holder
    ),
    "0-dim": Kind(each(lambda g: g[1])),
    "no elements": Kind(each(lambda g: g[:0])),
    "not contiguous": Kind(each(not_contiguous)),
    "conjugated": Kind(each(lambda g: torch.complex(g, -g).conj())),
    "negated": Kind(each(negated)),
    "negated, one element": Kind(lambda scale: [negated(g[1:]) for g in plain(scale)]),
    "copy on write": Kind(each(torch._lazy_clone)),
    "zero tensors": Kind(each(lambda g: torch._efficientzerotensor(2))),
    "inference": Kind(each(inference)),
    "carries graph": Kind(each(carries_graph)),
    "requires grad": Kind(each(lambda g: g.requires_grad_())),
    "expanded": Kind(each(lambda g: g[:, None].expand(2, 3))),
    "sliding windows": Kind(each(sliding)),
    "one twice": Kind(twice, differs="one gradient listed twice", meant=scaled_once),
    "partly overlapping": Kind(
        partly_overlapping, differs="gradients that partly overlap", meant=refused_if_written
    ),
    "meta": Kind(each(lambda g: g.to("meta"))),
    "cpu and meta": Kind(lambda scale: [plain(scale)[0], plain(scale)[1].to("meta")]),
    "sparse COO, dense": Kind(
        lambda s: [sparse(plain(s)[0]), plain(s)[1]],
        readable=stored,
        differs=SPARSE,
        meant=by_values,
    ),
    "sparse CSR": Kind(
        each(lambda g: torch.diag(g).to_sparse_csr()), foreach=False, holder=object_holder
    ),
    "mkldnn": Kind(each(lambda g: g.to_mkldnn()), foreach=False, holder=object_holder),
    "nested, jagged": Kind(each(nested(torch.jagged))),
    "nested, strided": Kind(each(nested(torch.strided)), foreach=False, holder=object_holder),
    "masked": Kind(each(lambda g: masked_tensor(g, g > 0)), foreach=False, holder=object_holder),
    "subclass by function": Kind(each(lambda g: g.as_subclass(FunctionSubclass))),
    "subclass by function, plain": Kind(
        lambda s: [plain(s)[0].as_subclass(FunctionSubclass), plain(s)[1]]
    ),
    "one component": Kind(each(OneComponent)),
    "one component, plain": Kind(lambda s: [OneComponent(plain(s)[0]), plain(s)[1]]),
    "one component, of other values": Kind(each(Doubled), foreach=False),
    "two components": Kind(each(lambda g: TwoTensor(g, g * 2))),
    "two components of two": Kind(
        each(lambda g: TwoTensor(TwoTensor(g, g * 2), TwoTensor(g * 3, g * 4)))
    ),
    "two components, plain": Kind(lambda s: [TwoTensor(*plain(s)), plain(s)[1]]),
    "functional": Kind(each(torch._to_functional_tensor)),
    "collective not waited for": Kind(each(AsyncCollectiveTensor), one_rank),
    "DTensor 1-D": Kind(sharded([1], [Shard(0)]), one_rank),
    "DTensor 1-D of 4": Kind(sharded([4], [Shard(0)]), four_pretended_ranks),
    "DTensor 2-D": Kind(sharded([1, 1], [Replicate(), Shard(0)]), one_rank),
    "DTensor 2-D of 2 × 2": Kind(sharded([2, 2], [Shard(0), Shard(1)]), four_pretended_ranks),
    "DTensor replicated": Kind(sharded([1], [Replicate()]), one_rank),
    "DTensor pending": Kind(sharded([1], [Partial()]), one_rank),
    "DTensor, plain": Kind(
        some_sharded, one_rank, readable=local, differs=SEVERAL_MESHES, meant=of_all_meshes
    ),
    "DTensors of two meshes": Kind(
        of_two_meshes, one_rank, readable=local, differs=SEVERAL_MESHES, meant=of_all_meshes
    ),
    **{f"dense, p = {p}": Kind(plain, norm_type=p) for p in NORM_TYPES},
    **{
        f"sparse COO, p = {p}": Kind(
            each(sparse), norm_type=p, readable=stored, differs=SPARSE, meant=by_values
        )
        for p in NORM_TYPES
    },
}
