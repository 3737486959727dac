"""The parallelisms, each as a list of parameters with gradients; run by ``processes``.

A case runs on every rank and must do the same on all of them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # here, and so before the ranks are forked: they would each import it for long
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fusedclip
from fusedclip.sharded import topology
from tests.distributed.checks import (
    NORM_RTOL,
    assert_same_on_all_ranks,
    check,
    check_policies,
    counted_collectives,
    dtensor_parameter,
    local,
    locals_of,
    true_norm,
    whole,
)
from tests.distributed.processes import Case
from tests.helpers import exact_coefficient, same_bits

CASES: dict[int, dict[str, Case]] = {2: {}, 4: {}}


def case(*world_sizes: int) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        for world_size in world_sizes:
            CASES[world_size][function.__name__] = function
        return function

    return register


class Block(nn.Module):
    """A norm and two linear layers, with sizes that two does not divide."""

    def __init__(self, width: int = 7, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.up = nn.Linear(width, 2 * width + 2, dtype=dtype)
        self.down = nn.Linear(2 * width + 2, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def world_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


def square_mesh(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


@contextmanager
def larger_world() -> Iterator[None]:
    """As if there were more ranks: no mesh is the world, so mesh dimensions add up one by one."""
    with mock.patch.object(topology, "world_size", lambda: 99):
        yield


def fsdp(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    model = nn.Sequential(Block(dtype=dtype), Block(dtype=dtype))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(torch.randn(3, 7, dtype=dtype)).square().sum().backward()
    return list(model.parameters())


def shards(
    mesh: DeviceMesh, placements: list[object], *shapes: tuple[int, ...]
) -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [
        dtensor_parameter(distribute_tensor(torch.randn(shape), mesh, placements))
        for shape in shapes
    ]


@case(2, 4)
def fsdp2() -> None:
    params = fsdp(world_mesh())
    check(params)
    check_policies(params, bad_rank=dist.get_world_size() - 1)


@case(2)
def fsdp2_bfloat16() -> None:
    params = fsdp(world_mesh(), torch.bfloat16)
    check(params)
    check_policies(params, bad_rank=0)


@case(2)
def fsdp2_mixed_precision() -> None:
    model = Block()
    fully_shard(model, mesh=world_mesh(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    model(torch.randn(3, 7)).sum().backward()
    check(list(model.parameters()))


@case(2)
def fp64_result() -> None:
    mesh = world_mesh()
    grad = distribute_tensor(torch.randn(5, dtype=torch.float64), mesh, [Shard(0)])
    params = [*shards(mesh, [Shard(0)], (4,)), dtensor_parameter(grad)]
    norm = fusedclip.clip_(params, 0.1)
    assert norm.dtype == torch.float64
    assert_same_on_all_ranks(norm)
    if dist.get_rank() == 1:
        params[1].grad = None
    assert fusedclip.get_total_norm([p.grad for p in params if p.grad is not None][:1])
    assert fusedclip.clip_(params, 0.1).dtype == torch.float64  # also where its gradient is not


@case(4)
def hsdp() -> None:
    params = fsdp(square_mesh("replicate", "shard"))
    check(params)
    check_policies(params, bad_rank=3)


@case(2)
def tensor_parallel() -> None:
    mesh = world_mesh()
    torch.manual_seed(0)
    model = parallelize_module(
        nn.ModuleDict({"block": Block(8)}),
        mesh,
        {"block.up": ColwiseParallel(), "block.down": RowwiseParallel()},
    )["block"]
    model(torch.randn(3, 8)).square().sum().backward()
    # `norm` is not in the plan: plain, and the same on all ranks.
    kinds = {type(p.grad) for p in model.parameters()}
    assert kinds == {Tensor, DTensor}
    check(list(model.parameters()))


@case(2)
def sequence_parallel() -> None:
    mesh = world_mesh()
    torch.manual_seed(0)
    model = parallelize_module(
        Block(8),
        mesh,
        {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        },
    )
    model(
        DTensor.from_local(torch.randn(2, 8), mesh, [Shard(0)])
    ).to_local().square().sum().backward()
    params = list(model.parameters())
    assert any(isinstance(p.grad, DTensor) and p.grad.placements[0].is_partial() for p in params)
    check(params)
    check_policies(params, bad_rank=1)


@case(4)
def fsdp_with_tensor_parallel() -> None:
    mesh = square_mesh("dp", "tp")
    torch.manual_seed(0)
    model = nn.Sequential(Block(8), Block(8))
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    torch.manual_seed(mesh.get_local_rank("dp"))
    model(torch.randn(3, 8)).square().sum().backward()
    params = list(model.parameters())
    # Mixed meshes: `norm` is sharded over dp alone. torch's function refuses the list.
    assert {p.grad.device_mesh.ndim for p in params} == {1, 2}
    assert any("_StridedShard" in repr(p.grad.placements) for p in params)
    with pytest.raises(Exception, match="mesh"):
        nn.utils.clip_grad_norm_(params, 1.0)
    check(params)
    check_policies(params, bad_rank=2)
    with larger_world():
        check(params)
        check_policies(params, bad_rank=1)


@case(4)
def expert_parallel() -> None:
    """Experts on (edp, ep), dense parameters on all ranks, as one list."""
    experts = square_mesh("edp", "ep")
    params = [
        *shards(world_mesh(), [Shard(0)], (9, 3), (5,)),
        *shards(experts, [Replicate(), Shard(0)], (4, 6)),
        *shards(experts, [Shard(1), Shard(0)], (4, 6)),
    ]
    check(params)
    check_policies(params, bad_rank=1)
    with larger_world():
        check(params)


@case(4)
def expert_submeshes() -> None:
    """Other experts on each half of the ranks; the process group knows all of them."""
    half = square_mesh("half", "ep")["ep"]
    torch.manual_seed(2 + dist.get_rank() // 2)
    expert = dtensor_parameter(distribute_tensor(torch.randn(5, 3), half, [Shard(0)]))
    dense = shards(world_mesh(), [Shard(0)], (9, 3))
    mine = whole(expert.grad)
    every: list[Tensor] = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(every, mine)
    truth = [every[0], every[2], whole(dense[0].grad)]
    params = [*dense, expert]
    for group in (dist.group.WORLD,):
        check(params, lambda order: true_norm(truth, order), process_group=group)
        check_policies(params, bad_rank=2, process_group=group)
    # Without it each half has the norm of what it lists.
    check(params, agree=False)


@case(4)
def pipeline_stages_of_fsdp() -> None:
    mesh = square_mesh("pp", "dp")
    torch.manual_seed(3 + mesh.get_local_rank("pp"))
    stage = [
        dtensor_parameter(distribute_tensor(torch.randn(5, 3), mesh["dp"], [Shard(0)])),
        dtensor_parameter(distribute_tensor(torch.randn(2), mesh["dp"], [Replicate()])),
    ]
    mine = torch.cat([whole(p.grad).flatten() for p in stage])
    every = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(every, mine, group=mesh.get_group("pp"))
    truth = [piece for stage_ in every for piece in stage_.split([15, 2])]
    # The group of stages, or all ranks at once: the meshes lie within it.
    for group in (mesh.get_group("pp"), dist.group.WORLD):
        check(stage, lambda order: true_norm(truth, order), process_group=group)
        check_policies(stage, bad_rank=1, process_group=group)


@case(2)
def pipeline_stages_of_plain_tensors() -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    grads = [torch.randn(5, 3), torch.randn(4)][: 2 - rank]
    params = [dtensor_parameter(grad) for grad in grads]
    every: list[list[Tensor] | None] = [None, None]
    dist.all_gather_object(every, [grad.double() for grad in grads])
    truth = [grad for part in every for grad in part or []]
    check(params, lambda order: true_norm(truth, order), process_group=dist.group.WORLD)
    check_policies(params, bad_rank=0, process_group=dist.group.WORLD)
    # A stage without any gradient takes part.
    if rank == 1:
        params = []
    norm = fusedclip.clip_(params, math.inf, process_group=dist.group.WORLD)
    assert norm.item() == pytest.approx(true_norm(every[0] or [], 2.0), rel=5e-7)


@case(2)
def duplicates_of_plain_tensors_count_once() -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    shard = torch.randn(6)
    duplicate = torch.arange(3.0)
    params = [dtensor_parameter(shard), dtensor_parameter(duplicate)]
    params[1].fusedclip_counted = rank == 0
    every = [torch.empty(6), torch.empty(6)]
    dist.all_gather(every, shard)
    truth = [*(grad.double() for grad in every), duplicate.double()]
    check(params, lambda order: true_norm(truth, order), process_group=dist.group.WORLD)
    # The twin: without the mark it counts twice.
    del params[1].fusedclip_counted
    twice = fusedclip.clip_(params, math.inf, process_group=dist.group.WORLD)
    assert twice.item() > 1.01 * true_norm(truth, 2.0)


@case(2, 4)
def uneven_and_empty_shards() -> None:
    mesh = world_mesh()
    params = shards(mesh, [Shard(0)], (1, 3), (3, 2), (7,), (0, 4))
    assert (local(params[0].grad).numel() == 0) == (dist.get_rank() > 0)
    check(params)
    check_policies(params, bad_rank=0)


@case(2)
def a_rank_with_no_elements() -> None:
    params = shards(world_mesh(), [Shard(0)], (1, 3))
    check(params)
    check_policies(params, bad_rank=0)


@case(2, 4)
def a_rank_with_no_gradients() -> None:
    """Its parameters make it take part."""
    params = shards(world_mesh(), [Shard(0)], (4, 3), (8,))
    plain = dtensor_parameter(torch.ones(3))
    expected = fusedclip.clip_([*params, plain], math.inf)
    grads = [whole(p.grad) for p in params]
    mine = [local(p.grad).double() for p in params]
    lost = sum(values.square().sum() for values in mine)
    dist.broadcast(lost, src=0)
    if dist.get_rank() == 0:
        for p in params:
            p.grad = None
    norm = fusedclip.clip_([*params, plain], 1.0)
    truth = true_norm([*grads, torch.ones(3).double()], 2.0)
    assert expected.item() == pytest.approx(truth, rel=5e-7)
    assert norm.item() == pytest.approx(math.sqrt(truth**2 - lost.item()), rel=5e-7)
    assert_same_on_all_ranks(norm)
    assert_same_on_all_ranks(fusedclip.clip_(params, math.inf, math.inf))


@case(2, 4)
def replicated() -> None:
    params = shards(world_mesh(), [Replicate()], (4, 3), (5,))
    check(params)
    check_policies(params, bad_rank=1)


@case(4)
def replicated_and_sharded_on_one_mesh() -> None:
    mesh = square_mesh("dp", "tp")
    kinds = [[Shard(0), Shard(0)], [Replicate(), Shard(1)], [Shard(1), Replicate()]]
    params = [p for placements in kinds for p in shards(mesh, placements, (4, 5))]
    params += shards(mesh, [Replicate(), Replicate()], (3, 2))
    check(params)
    check_policies(params, bad_rank=3)


@case(2, 4)
def partial() -> None:
    mesh = world_mesh()
    torch.manual_seed(dist.get_rank())
    params = [
        dtensor_parameter(DTensor.from_local(torch.randn(5, 3), mesh, [Partial()])),
        dtensor_parameter(DTensor.from_local(torch.randn(4), mesh, [Partial("avg")])),
        dtensor_parameter(DTensor.from_local(torch.randn(3), mesh, [Partial()])),
        *shards(mesh, [Shard(0)], (6,)),
    ]
    check(params)
    check_policies(params, bad_rank=0)
    with mock.patch(
        "fusedclip.sharded.partial.BUCKET_ELEMENTS", 6
    ):  # gradients over several buckets
        check(params)
    fusedclip.clip_(params, 0.1)
    assert params[0].grad.placements == (Partial(),)
    norm = true_norm([whole(p.grad) for p in params], 2.0)
    assert norm == pytest.approx(0.1, rel=1e-5)


@case(4)
def partial_on_one_and_on_two_dimensions() -> None:
    mesh = square_mesh("dp", "tp")
    params = []
    for placements in ([Partial(), Shard(0)], [Partial(), Partial()], [Replicate(), Partial()]):
        seed = sum(
            rank * (2 - d)
            for d, rank in enumerate(mesh.get_coordinate())
            if not placements[d].is_replicate()
        )
        torch.manual_seed(seed)
        params.append(dtensor_parameter(DTensor.from_local(torch.randn(5, 3), mesh, placements)))
    check(params)


@case(2)
def unsupported_placements() -> None:
    mesh = world_mesh()
    good = shards(mesh, [Shard(0)], (4,))[0]
    bad = dtensor_parameter(DTensor.from_local(torch.ones(4), mesh, [Partial("max")]))
    before = local(good.grad).clone()
    with pytest.raises(ValueError, match=r"grads\[1\]: expected Partial.*got P.*redistribute"):
        fusedclip.clip_([good, bad], 0.1)
    assert torch.equal(local(good.grad), before)
    with pytest.raises(TypeError, match=r"process_group: expected .*ProcessGroup, got DeviceMesh"):
        fusedclip.clip_([good], 0.1, process_group=mesh)


@case(2)
def gradient_listed_twice() -> None:
    params = shards(world_mesh(), [Shard(0)], (4, 3))
    summand = DTensor.from_local(torch.ones(3), world_mesh(), [Partial()])
    params.append(dtensor_parameter(summand))
    once = fusedclip.clip_(params, math.inf)
    assert fusedclip.clip_(params * 2, math.inf) == once


@case(2, 4)
def tensor_norms() -> None:
    mesh = world_mesh()
    torch.manual_seed(dist.get_rank())
    summand = DTensor.from_local(torch.randn(5, 3), mesh, [Partial()])
    params = [*shards(mesh, [Shard(0)], (1, 3), (5,)), *shards(mesh, [Replicate()], (3,))]
    grads = [*(p.grad for p in params), summand, torch.arange(4.0)]
    for order in (2.0, math.inf, 1.0, 0.0):
        with counted_collectives() as counts:
            norms = fusedclip.get_tensor_norms(grads, order)
        truth = [torch.linalg.vector_norm(whole(grad), order).item() for grad in grads]
        torch.testing.assert_close(norms, torch.tensor(truth), rtol=5e-7, atol=0.0)
        reductions = [key for key in counts.elements() if key.startswith("all_reduce")]
        assert len(reductions) == 1, counts


@case(2, 4)
def monitor() -> None:
    """Whole norms of shards, replicas and pending sums: one all-reduce more, the same clip."""
    mesh = world_mesh()
    torch.manual_seed(dist.get_rank())
    summand = DTensor.from_local(torch.randn(5, 3), mesh, [Partial()])
    params = [*shards(mesh, [Shard(0)], (1, 3), (5,)), *shards(mesh, [Replicate()], (3,))]
    params += [dtensor_parameter(summand), nn.Parameter(torch.zeros(4))]
    params[-1].grad = torch.arange(4.0)
    truth = [true_norm([whole(p.grad)], 2.0) for p in params]
    for order in (2.0, math.inf):
        expected = fusedclip.clip_(params, math.inf, order)
        clipper = fusedclip.Clipper(params, math.inf, norm_type=order, monitor=True)
        with counted_collectives() as counts:
            norm = clipper.clip_()
        reductions = [key for key in counts.elements() if key.startswith("all_reduce")]
        assert len(reductions) == 2, counts
        torch.testing.assert_close(norm, expected, rtol=1e-7, atol=0.0)
        assert clipper.monitor is not None
        if order == 2.0:
            top = clipper.monitor.summary().top
            ranked = sorted(enumerate(truth), key=lambda pair: -pair[1])
            assert [part.name for part in top] == [f"parameters[{i}]" for i, _ in ranked]
            assert [part.norm for part in top] == pytest.approx([x for _, x in ranked], rel=5e-7)


@case(2)
def monitor_of_pipeline_stages() -> None:
    """With a process group each rank knows the norms of its own parameters."""
    group = dist.group.WORLD
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0]) * (1 + dist.get_rank())
    clipper = fusedclip.Clipper([p], 1.0, monitor=True, process_group=group)
    norm = clipper.clip_()
    assert norm.item() == pytest.approx(math.hypot(5.0, 10.0))
    assert clipper.monitor is not None
    summary = clipper.monitor.summary()
    assert summary.last_norm == norm.item()
    assert summary.top[0].norm == 5.0 * (1 + dist.get_rank())


@case(2)
def drop_in_family() -> None:
    """What torchtitan does: norm, its own reduction over stages, then the scaling."""
    params = shards(world_mesh(), [Shard(0)], (4, 3), (5,))
    grads = [p.grad for p in params]
    expected = true_norm([whole(grad) for grad in grads], 2.0)
    theirs = nn.utils.get_total_norm(grads)
    with fusedclip.patch(rebind=True):
        norm = nn.utils.get_total_norm(grads)
        assert isinstance(norm, DTensor)
        with counted_collectives() as seen:
            assert norm.full_tensor().item() == pytest.approx(expected, rel=5e-7)
        assert not seen  # it is the same on all ranks already
        norm **= 2.0
        norm **= 0.5
        before = [values.clone() for values in locals_of(params)]
        nn.utils.clip_grads_with_norm_(params, expected / 2, norm)
        for after, old in zip(locals_of(params), before, strict=True):
            torch.testing.assert_close(after, old / 2)
            after.copy_(old)
        nn.utils.clip_grads_with_norm_(params, expected / 2, theirs)  # torch's own DTensor
        for after, old in zip(locals_of(params), before, strict=True):
            torch.testing.assert_close(after, old / 2)
            after.copy_(old)
        norm = nn.utils.clip_grad_norm_((p for p in params), 1.0)
    assert norm.item() == pytest.approx(expected, rel=5e-7)


@case(2)
def clip_by_value() -> None:
    """Local shards are clamped where they are; a list with pending sums is torch's to judge."""
    mesh = world_mesh()
    params = [
        *shards(mesh, [Shard(0)], (5, 3), (1,)),
        *shards(mesh, [Replicate()], (4,)),
        dtensor_parameter(torch.randn(3)),
    ]
    expected = [whole(p.grad).clamp(-0.5, 0.5) for p in params]
    with mock.patch("fusedclip.dispatched.clamp_") as torchs:
        fusedclip.clip_grad_value_(params, 0.5)
    assert not torchs.called
    for p, values in zip(params, expected, strict=True):
        assert torch.equal(whole(p.grad), values)

    summand = DTensor.from_local(torch.tensor([3.0, -3.0 * dist.get_rank()]), mesh, [Partial()])
    results = []
    for clip in (nn.utils.clip_grad_value_, fusedclip.clip_grad_value_):
        pending = dtensor_parameter(summand.clone())
        try:
            clip([pending], 1.0)
            results.append(whole(pending.grad).tolist())
        except Exception as error:
            results.append(type(error))
    assert results[0] == results[1]


@case(2)
def unit_wise_clipping_of_shards() -> None:
    """agc_ by DTensor's own operations: a unit's norm is that of all its shards."""
    mesh = world_mesh()
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        (param,) = shards(mesh, placements, (5, 3))
        plain = nn.Parameter(whole(param))
        plain.grad = whole(param.grad).clone()
        fusedclip.agc_([param, plain], clip_factor=0.1)
        torch.testing.assert_close(whole(param.grad), plain.grad)


@case(2)
def policies_by_scope() -> None:
    """Memory of whole parameters, the same on all ranks: as one process has with all of them."""
    mesh, sizes = world_mesh(), ((5, 3), (7,), (2, 2))
    for make in (
        lambda: fusedclip.AdaGC(absolute=20.0, warmup=4),
        lambda: fusedclip.AutoClip(50, window=8),
        lambda: fusedclip.ZClip(warmup=3, z=1.5),
        lambda: 2.0,
    ):
        for scope in ("global", "group", "parameter"):
            sharded = [
                nn.Parameter(distribute_tensor(torch.zeros(s), mesh, [Shard(0)])) for s in sizes
            ]
            plain = [nn.Parameter(torch.zeros(s)) for s in sizes]
            clippers = []
            for params in (sharded, plain):
                groups = [{"params": params[:1]}, {"params": params[1:]}]
                optimizer = torch.optim.SGD(groups, lr=0.1)
                clippers.append(fusedclip.Clipper(optimizer, make(), scope=scope, monitor=True))
            for step in range(12):
                torch.manual_seed(step)
                for p, q in zip(sharded, plain, strict=True):
                    q.grad = torch.randn(q.shape) * (50.0 if step == 8 else 1.0)
                    p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
                norms, expected = (clipper.clip_() for clipper in clippers)
                torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
                for p, q in zip(sharded, plain, strict=True):
                    torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-7)
            state, other = (clipper.state_dict()["max_norm"] for clipper in clippers)
            torch.testing.assert_close(state, other, rtol=1e-5, atol=0)
            seen, told = (clipper.monitor.summary() for clipper in clippers)
            assert [s.name for s in seen.scopes] == [s.name for s in told.scopes]


@case(2)
def steps_left_out() -> None:
    """The verdict is the same on all ranks, though the spike is in the shard of one."""
    for scope in ("global", "parameter"):
        model = nn.Sequential(Block(), Block())
        fully_shard(model, mesh=world_mesh())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        fusedclip.Clipper(model, 1.0, scope=scope, skip_above=1e4).attach(optimizer)
        for step in range(4):
            model(torch.randn(3, 7)).square().sum().backward()
            if step == 2 and dist.get_rank() == 1:
                local(next(model.parameters()).grad).fill_(1e6)
            before = [local(p).detach().clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            kept = [same_bits(b, local(p)) for b, p in zip(before, model.parameters(), strict=True)]
            assert all(kept) if step == 2 else not any(kept), (scope, step)


@case(2)
def clipping_during_backward() -> None:
    """FSDP2 calls the hooks after its reduce-scatter: as a clip after backward."""
    results = []
    for during in (False, True):
        torch.manual_seed(5)
        model = nn.Sequential(Block(), Block())
        for block in model:
            fully_shard(block, mesh=world_mesh())
        fully_shard(model, mesh=world_mesh())
        clipper = fusedclip.Clipper(model, 0.5, scope="parameter", monitor=True)
        if during:
            clipper.attach_to_backward()
        torch.manual_seed(6 + dist.get_rank())
        model(torch.randn(3, 7)).square().sum().backward()
        if not during:
            clipper.clip_()
        assert clipper.last_norm is not None
        results.append((clipper.last_norm, [p.grad.full_tensor() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)
    assert all(grad.norm() <= 0.5001 for grad in results[1][1])


@case(2)
def mixed_precision() -> None:
    """One norm and one verdict on all ranks, with an optimizer that unscales by itself too."""
    for optimizer_type, fused in ((torch.optim.SGD, False), (torch.optim.AdamW, True)):
        params = fsdp(world_mesh())
        wholes = [whole(p.grad) for p in params]
        optimizer = optimizer_type(params, lr=1.0, fused=fused)
        scaler = fusedclip.amp.GradScaler("cpu", init_scale=8.0, max_norm=1e-3)
        scaler.scale(torch.ones(()))
        before = [values.clone() for values in locals_of(params)]
        scaler.step(optimizer)
        assert scaler.last_norm.item() == pytest.approx(true_norm(wholes, 2.0) / 8, rel=NORM_RTOL)
        assert_same_on_all_ranks(scaler.last_norm)
        factor = exact_coefficient(scaler.last_norm.item(), 1e-3) / 8
        for after, old in zip(locals_of(params), before, strict=True):
            torch.testing.assert_close(after, old * factor)
        scaler.update()

        values = [local(p).detach().clone() for p in params]
        if dist.get_rank() == 1:
            local(params[0].grad).fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0
        assert not scaler.last_norm.isfinite()
        for p, old in zip(params, values, strict=True):
            assert torch.equal(local(p), old)


@case(2)
def mixed_precision_on_a_rank_without_gradients() -> None:
    params = shards(world_mesh(), [Shard(0)], (4, 3))
    rank = dist.get_rank()
    for group in (None, dist.group.WORLD):
        if group is not None:  # plain tensors; this rank has none
            params = [dtensor_parameter(torch.full((3,), 8.0))]
        if rank == 1:
            params[0].grad = None
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        optimizer = torch.optim.SGD(params, lr=1.0)
        norm = fusedclip.amp.unscale_and_clip_(scaler, optimizer, 1.0, process_group=group)
        assert_same_on_all_ranks(norm)
        assert norm > 0
        scaler.step(optimizer)  # torch refuses it on a rank that recorded no check
        scaler.update()
        if rank == 0:
            local(params[0].grad).fill_(math.nan)
        fusedclip.amp.unscale_and_clip_(scaler, optimizer, 1.0, process_group=group)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0


@case(2)
def compiled_region() -> None:
    params = fsdp(world_mesh())
    optimizer = torch.optim.SGD(params, lr=0.1)

    @torch.compile(backend="eager")
    def step() -> Tensor:
        norm = fusedclip.clip_(params, 0.5)
        optimizer.step()
        return norm * 2

    truth = true_norm([whole(p.grad) for p in params], 2.0)
    assert step().item() == pytest.approx(2 * truth, rel=5e-7)
    assert true_norm([whole(p.grad) for p in params], 2.0) == pytest.approx(0.5, rel=1e-5)


@case(2)
def compiled_region_with_a_process_group() -> None:
    params = [dtensor_parameter(torch.full((3,), 1.0 + dist.get_rank()))]

    @torch.compile(backend="eager")
    def step(group: object) -> Tensor:
        return fusedclip.clip_(params, 0.5, process_group=group) * 2

    assert step(dist.group.WORLD).item() == pytest.approx(2 * math.sqrt(15))


@case(2)
def data_parallel_needs_nothing() -> None:
    model = nn.parallel.DistributedDataParallel(Block())
    torch.manual_seed(dist.get_rank())
    model(torch.randn(3, 7)).square().sum().backward()
    with counted_collectives() as counts, CommDebugMode() as mode:
        norm = fusedclip.clip_(model, 0.1)
    assert not counts and mode.get_total_counts() == 0
    assert_same_on_all_ranks(norm)


@case(4)
def collectives_of_a_call() -> None:
    """One all-reduce of one number a process group, whatever the list."""
    mesh = square_mesh("dp", "tp")
    both = shards(mesh, [Shard(0), Shard(1)], (4, 4), (3, 5))
    one = shards(mesh["dp"], [Shard(0)], (4, 4))
    rows = {0: [0, 2], 1: [1, 3], 2: [0, 2], 3: [1, 3]}[dist.get_rank()]
    columns = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}[dist.get_rank()]
    world = "all_reduce [0, 1, 2, 3] × 1"
    expected = {
        "one mesh": (both, {world: 1}),
        "two meshes": (both + one, {world: 1, f"all_reduce {rows} × 1": 1}),
        "more of them": (5 * (both + one), {world: 1, f"all_reduce {rows} × 1": 1}),
    }
    for name, (params, counts) in expected.items():
        for max_norm in (0.1, 1e9):
            with counted_collectives() as seen, CommDebugMode() as mode:
                fusedclip.clip_(params, max_norm)
            assert dict(seen) == counts, name
            assert mode.get_total_counts() == len(counts), name
    with larger_world():
        with counted_collectives() as seen:
            fusedclip.clip_(both + one, 0.1)
        # The group of rows adds up both meshes at once.
        assert dict(seen) == {f"all_reduce {columns} × 1": 1, f"all_reduce {rows} × 2": 1}
    # The twin: torch's function communicates more than once, and the count sees it.
    with CommDebugMode() as mode:
        nn.utils.clip_grad_norm_(both, 1e9).full_tensor()
    assert mode.get_total_counts() > 1


@case(2)
def a_rank_that_raises_before() -> None:
    """It leaves, as a process that ends does; the other one says what may have happened."""
    group = dist.new_group([0, 1])
    params = [dtensor_parameter(torch.ones(3))]
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="max_norm"):
            fusedclip.clip_(params, -1.0, process_group=group)
        dist.destroy_process_group(group)
        del group  # closes its connections
        dist.barrier()
        return
    message = r"rank 0: adding up .* over ranks \[0, 1\] failed.*\n.*Another of these ranks raised"
    with pytest.raises(RuntimeError, match=message):
        fusedclip.clip_(params, 1.0, process_group=group)
    assert torch.equal(params[0].grad, torch.ones(3))
    dist.barrier()


def extra_memory(call: Callable[[list[nn.Parameter]], object], params: list[nn.Parameter]) -> int:
    """KiB that the process grew by at most during ``call``."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1])

    call(params[:1])  # threads, code and connections are there before the measurement
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    call(params)
    return status("VmHWM") - before


@case(2)
def no_memory_that_grows_with_the_gradients() -> None:
    if not Path("/proc/self/clear_refs").exists():
        return  # reads Linux's memory accounting
    mesh = world_mesh()
    numel = 500_000
    params = [
        dtensor_parameter(DTensor.from_local(torch.ones(numel), mesh, [Shard(0)]))
        for _ in range(30)
    ]  # 60 MB on each rank
    assert extra_memory(lambda params: fusedclip.clip_(params, 1.0), params) < 2_000
    # The twin: a copy of all gradients is seen.
    copy = lambda params: torch.cat([local(p.grad) for p in params]).norm()  # noqa: E731
    assert extra_memory(copy, params) > 50_000
    # Of pending sums there is a bucket and its share at a time, not all of them.
    params = [
        dtensor_parameter(DTensor.from_local(torch.ones(numel), mesh, [Partial()]))
        for _ in range(60)
    ]  # 120 MB on each rank, 29 buckets
    grown = extra_memory(lambda params: fusedclip.clip_(params, math.inf), params)
    assert grown < 50_000, grown


@case(2)
def counted_on_one_rank() -> None:
    """A gradient of each rank's own and one that both hold: every way counts the second once."""
    rank, group = dist.get_rank(), dist.group.WORLD
    own, shared = 3.0 if rank == 0 else 12.0, 4.0

    def fresh() -> list[nn.Parameter]:
        made = []
        for value in (own, shared):
            made.append(nn.Parameter(torch.zeros(1)))
            made[-1].grad = torch.tensor([value])
        made[1].fusedclip_counted = rank == 0
        return made

    for order, expected, each in (
        (2.0, 13.0, [math.sqrt(9 + 144), 4.0]),
        (math.inf, 12.0, [12.0, 4.0]),
        (1.0, 19.0, [15.0, 4.0]),
    ):
        options = {"norm_type": order, "process_group": group}
        assert fusedclip.clip_(fresh(), math.inf, **options).item() == pytest.approx(expected)
        optimizer = torch.optim.SGD(fresh(), lr=1.0)
        by_group = fusedclip.Clipper(optimizer, 1.0, scope="group", **options).clip_()
        assert by_group.tolist() == pytest.approx([expected])
        for parameter, value in zip(
            optimizer.param_groups[0]["params"], (own, shared), strict=True
        ):
            assert parameter.grad.item() == pytest.approx(value / expected, rel=1e-5)
        by_parameter = fusedclip.Clipper(fresh(), 1.0, scope="parameter", **options).clip_()
        assert by_parameter.tolist() == pytest.approx(each)
        clipper = fusedclip.Clipper(fresh(), 1.0, monitor=True, **options)
        assert clipper.clip_().item() == pytest.approx(expected)
        assert clipper.monitor is not None
        tensor_norms = clipper.monitor.state_dict()["tensor_norms"].tolist()
        assert tensor_norms == [[own, shared if rank == 0 else 0.0]]
