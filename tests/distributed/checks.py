"""What the cases share: the truth in one process's fp64, and the checks against it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fusedclip
from tests.helpers import assert_scaled, exact_coefficient, same_bits

NORM_RTOL = 5e-7


def dtensor_parameter(grad: Tensor | None, like: Tensor | None = None) -> nn.Parameter:
    """A parameter with this gradient, or like this tensor and without one."""
    described = grad if like is None else like
    assert described is not None
    p = nn.Parameter(torch.zeros_like(described))
    p.grad = grad
    return p


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def locals_of(params: Sequence[Tensor]) -> list[Tensor]:
    return [local(p.grad) for p in params if p.grad is not None]


def whole(grad: Tensor) -> Tensor:
    """All values in fp64, gathered by torch."""
    wide = grad.detach().to(torch.float64)
    return wide.full_tensor() if isinstance(wide, DTensor) else wide


def true_norm(wholes: Sequence[Tensor], order: float) -> float:
    """torch's norm of norms in fp64."""
    norms = [torch.linalg.vector_norm(values, order) for values in wholes if values.numel()]
    return torch.linalg.vector_norm(torch.stack(norms), order).item() if norms else 0.0


def assert_same_on_all_ranks(norm: Tensor, group: Any = None) -> None:
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, norm.item().hex(), group=group)
    assert len(set(gathered)) == 1, gathered


def check(
    params: Sequence[nn.Parameter],
    norm: Callable[[float], float] | None = None,
    *,
    agree: bool = True,
    **options: Any,
) -> None:
    """Norms of several orders, clipped and not, with both backends, against the truth.

    Args:
        norm: order → the true norm; by default that of the gradients as torch gathers them.
        agree: whether all ranks of the world have the same norm.
    """
    wholes = [whole(p.grad) for p in params if p.grad is not None]
    if norm is None:
        norm = lambda order: true_norm(wholes, order)  # noqa: E731
    for backend in ("cpu", "reference"):
        for order in (2.0, math.inf, 1.0, 3.0, 0.0):
            expected = norm(order)
            actual = fusedclip.clip_(params, math.inf, order, backend=backend, **options)
            assert type(actual) is Tensor and actual.dim() == 0
            assert actual.item() == pytest.approx(expected, rel=NORM_RTOL), (backend, order)
        for factor in (2.0, 0.5):
            before = [values.clone() for values in locals_of(params)]
            expected = norm(2.0)
            actual = fusedclip.clip_(params, factor * expected, backend=backend, **options)
            assert actual.item() == pytest.approx(expected, rel=NORM_RTOL)
            if agree:
                assert_same_on_all_ranks(actual)
            coefficient = exact_coefficient(expected, factor * expected)
            for after, old in zip(locals_of(params), before, strict=True):
                assert_scaled(after, old, coefficient)
            for after, old in zip(locals_of(params), before, strict=True):
                after.copy_(old)


def check_policies(params: Sequence[nn.Parameter], bad_rank: int, **options: Any) -> None:
    """One bad value on one rank makes every rank do the same."""
    places = [i for i, p in enumerate(params) if p.grad is not None and local(p.grad).numel()]
    before = [values.clone() for values in locals_of(params)]

    def spoil(value: float) -> None:
        for after, old in zip(locals_of(params), before, strict=True):
            after.copy_(old)
        if dist.get_rank() == bad_rank:
            local(params[places[-1]].grad).view(-1)[-1] = value

    for value, order in ((math.nan, 2.0), (math.nan, math.inf), (math.inf, 2.0)):
        spoil(value)
        spoiled = [values.clone() for values in locals_of(params)]
        with pytest.raises(fusedclip.NonfiniteGradientError, match=rf"rank {bad_rank}: grads"):
            fusedclip.clip_(params, 1.0, order, nonfinite="error", **options)
        assert all(map(same_bits, locals_of(params), spoiled))
        norm = fusedclip.clip_(params, 1.0, order, nonfinite="zero", **options)
        assert math.isnan(norm.item()) if math.isnan(value) else math.isinf(norm.item())
        assert all(not values.any() for values in locals_of(params))
        spoil(value)
        norm = fusedclip.clip_(params, 1.0, order, **options)
        for values in locals_of(params):
            if math.isnan(value):
                assert values.isnan().all()
            else:
                assert ((values == 0) | values.isnan()).all()
    spoil(local(params[places[-1]].grad).view(-1)[-1].item() if places else 0.0)
    for after, old in zip(locals_of(params), before, strict=True):
        after.copy_(old)


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Counts the collectives of this process, by name and the ranks that take part."""
    counts: Counter[str] = Counter()
    names = [
        "all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast",
        "all_gather_object", "all_to_all_single", "reduce", "gather", "barrier",
    ]  # fmt: skip
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            group = options.get("group")
            numel = arguments[0].numel() if isinstance(arguments[0], Tensor) else 0
            counts[f"{name} {dist.get_process_group_ranks(group)} × {numel}"] += 1
            return originals[name](*arguments, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, originals[name])
