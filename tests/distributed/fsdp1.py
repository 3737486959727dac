"""Cases of FullyShardedDataParallel (FSDP1): its own method, replaced by ``fusedclip.patch()``."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

import fusedclip
from fusedclip.call import Clipped, listeners
from fusedclip.integrations import fsdp1
from fusedclip.parameters import known_names
from tests.distributed.checks import NORM_RTOL, assert_same_on_all_ranks, counted_collectives
from tests.distributed.processes import Case
from tests.helpers import assert_scaled, exact_coefficient, same_bits

CASES: dict[int, dict[str, Case]] = {2: {}}
CPU = torch.device("cpu")
_TORCHS = FSDP.clip_grad_norm_


def case(function: Case) -> Case:
    CASES[2][function.__name__] = function
    return function


def _model(use_orig_params: bool = True, **options: object) -> FSDP:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    options = {"use_orig_params": use_orig_params, "device_id": CPU, **options}
    model[0] = FSDP(model[0], **options)
    return FSDP(model, **options)


def _backward(model: nn.Module) -> None:
    torch.manual_seed(100 + dist.get_rank())
    model(torch.randn(4, 5)).square().sum().backward()


def _truth(model: FSDP, order: float, whole: frozenset[Tensor] = frozenset()) -> float:
    """In fp64, from all values of all ranks; those of ``whole`` parameters are on each."""
    mine = [
        p.grad.double().flatten()
        for p in model.parameters()
        if p.grad is not None and p not in whole
    ]
    gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    values = [each for rank in gathered for each in rank]
    values += [p.grad.double().flatten() for p in model.parameters() if p in whole]
    return torch.linalg.vector_norm(torch.cat(values), order).item()


def _check(
    model: FSDP,
    whole: frozenset[Tensor] = frozenset(),
    orders: tuple[float, ...] = (2.0, math.inf, 1.0, 3.0),
) -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for order in orders:
        for factor in (2.0, 0.5):
            before = [grad.clone() for grad in grads]
            expected = _truth(model, order, whole)
            norm = model.clip_grad_norm_(factor * expected, order)
            assert type(norm) is Tensor and norm.dtype == torch.float32 and norm.dim() == 0
            assert norm.item() == pytest.approx(expected, rel=NORM_RTOL), (order, factor)
            assert_same_on_all_ranks(norm)
            coefficient = exact_coefficient(expected, factor * expected)
            for after, old in zip(grads, before, strict=True):
                assert_scaled(after, old, coefficient)
                after.copy_(old)


@contextmanager
def _told() -> Iterator[list[Clipped]]:
    class Listener:
        def __init__(self) -> None:
            self.clips: list[Clipped] = []

        def heard(self, clipped: Clipped) -> None:
            self.clips.append(clipped)

    listener = Listener()
    listeners.add(listener)
    yield listener.clips
    listeners.discard(listener)


def _each_layout(check: Callable[[FSDP], None], **options: object) -> None:
    for use_orig_params in (True, False):
        model = _model(use_orig_params, **options)
        _backward(model)
        with fusedclip.patch():
            check(model)


@case
def norms_and_gradients() -> None:
    _each_layout(_check)


@case
def it_is_torchs_norm() -> None:
    """The twin of the truth above: torch's own method, before and after."""
    model = _model()
    _backward(model)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = model.clip_grad_norm_(0.1)
    scaled = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for grad, old in zip(
        [p.grad for p in model.parameters() if p.grad is not None], grads, strict=True
    ):
        grad.copy_(old)
    with fusedclip.patch():
        assert FSDP.clip_grad_norm_ is not _TORCHS
        torch.testing.assert_close(model.clip_grad_norm_(0.1), expected)
    for p, old in zip([p for p in model.parameters() if p.grad is not None], scaled, strict=True):
        torch.testing.assert_close(p.grad, old)
    assert FSDP.clip_grad_norm_ is _TORCHS


@case
def one_value_travels_once() -> None:
    model = _model()
    _backward(model)
    with fusedclip.patch():
        model.clip_grad_norm_(1.0)
        with counted_collectives() as counts:
            model.clip_grad_norm_(1.0)
    assert counts == {"all_reduce [0, 1] × 1": 1}


@case
def unsharded_parameters_count_once() -> None:
    """A module whose parameters every rank has, and one that FSDP is told to leave alone."""

    def check(strategy: ShardingStrategy | None) -> None:
        torch.manual_seed(1)
        inner: nn.Module = nn.Linear(5, 7)
        options: dict[str, object] = {"use_orig_params": True, "device_id": CPU}
        if strategy is not None:
            inner = FSDP(inner, sharding_strategy=strategy, **options)
        model = nn.Sequential(inner, nn.Linear(7, 3))
        ignored = None if strategy is not None else list(inner.parameters())
        sharded = FSDP(model, ignored_states=ignored, **options)
        whole = frozenset(inner.parameters())
        _backward(sharded)
        for p in whole:  # FSDP does not add up what it ignores
            dist.all_reduce(p.grad)
        with fusedclip.patch():
            _check(sharded, whole, orders=(2.0, math.inf))

    check(ShardingStrategy.NO_SHARD)
    check(None)


@case
def nothing_is_sharded() -> None:
    model = _model(sharding_strategy=ShardingStrategy.NO_SHARD)
    _backward(model)
    with fusedclip.patch(), counted_collectives() as counts, warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = model.clip_grad_norm_(1.0)
        assert norm == fusedclip.get_total_norm([norm])
        fusedclip.clip_grad_norm_(model.parameters(), 1.0)  # as torch's documentation allows
    assert not counts
    assert_same_on_all_ranks(norm)


@case
def gradients_of_half_precision() -> None:
    """torch rounds the norm to their type."""
    policy = MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True)
    model = _model(mixed_precision=policy)
    _backward(model)
    assert any(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    with fusedclip.patch():
        _check(model, orders=(2.0,))


@case
def a_rank_without_a_gradient() -> None:
    model = _model()
    _backward(model)
    if dist.get_rank() == 1:
        for p in model.parameters():
            p.grad = None
    with fusedclip.patch():
        expected = _truth(model, 2.0)
        norm = model.clip_grad_norm_(expected / 2)
    assert norm.item() == pytest.approx(expected, rel=NORM_RTOL)
    assert_same_on_all_ranks(norm)


@case
def the_threshold_of_the_command_line() -> None:
    model = _model()
    _backward(model)
    with fusedclip.patch(max_norm=0.25):
        model.clip_grad_norm_(1e9)
        assert model.clip_grad_norm_(math.inf).item() == pytest.approx(0.25, rel=1e-5)


@case
def it_is_announced_with_names() -> None:
    model = _model()
    _backward(model)
    with fusedclip.patch(), _told() as clips:
        norm = model.clip_grad_norm_(3.0)
    (clipped,) = clips
    assert clipped.norm is norm and clipped.threshold == 3.0
    names = known_names(model)
    assert [names[id(tensor)] for tensor in clipped.tensors] == [
        "2.weight", "2.bias", "0.weight", "0.bias"
    ]  # fmt: skip


@case
def shards_through_torchs_function_are_told_of_once() -> None:
    model = _model()
    _backward(model)
    with fusedclip.patch():
        with pytest.warns(UserWarning, match="sees the shards of this rank alone"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            model.clip_grad_norm_(1.0)


@case
def only_the_root_clips() -> None:
    model = _model()
    _backward(model)
    with fusedclip.patch(), pytest.raises(RuntimeError, match="root FullyShardedDataParallel"):
        model.module[0].clip_grad_norm_(1.0)


@case
def a_bad_value_on_one_rank_reaches_all() -> None:
    model = _model()
    _backward(model)
    mine = [p.grad for p in model.parameters() if p.grad is not None]
    if dist.get_rank() == 1:
        mine[0].view(-1)[0] = math.nan
    with fusedclip.patch():
        assert model.clip_grad_norm_(1.0).isnan()
    assert all(grad.isnan().all() for grad in mine)


@case
def the_integration_alone() -> None:
    with fsdp1.patch():
        assert FSDP.clip_grad_norm_ is not _TORCHS
        model = _model()
        _backward(model)
        _check(model, orders=(2.0,))
    assert FSDP.clip_grad_norm_ is _TORCHS
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.clip_grad_norm_(math.inf)
    left = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(same_bits, left, grads))
