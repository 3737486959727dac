"""What ``test_torchtitan`` runs on two and four ranks: torchtitan's clip as its trainer calls it.

``dist_utils.clip_grad_norm_`` is torchtitan's; the model, the meshes and the loop around it are
made here, as small as they can be.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.distributed.processes import Case
from tests.integrations.harness import Run, parameters_of, twice

_STEPS = 8

CASES: dict[int, dict[str, Case]] = {2: {}, 4: {}}


def case(world_size: int) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        CASES[world_size][function.__name__] = function
        return function

    return register


def _stage(stage: int, mesh: DeviceMesh | None) -> nn.Module:
    """The part of a model that a pipeline stage holds, sharded over ``mesh``."""
    torch.manual_seed(10 + stage)
    width = 12 + 5 * stage  # two does not divide it
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
    if mesh is not None:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _train(model: nn.Module, seed: int, max_norm: float, pp_mesh: DeviceMesh | None) -> Run:
    """torchtitan's step: backward, clip with ``foreach`` and the pipeline's mesh, step."""
    from torchtitan.distributed import utils as dist_utils

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(_STEPS):
        inputs = torch.randn(16, 8, generator=generator)
        loss = (model(inputs) - 2 * inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = dist_utils.clip_grad_norm_(
            list(model.parameters()), max_norm, foreach=True, pp_mesh=pp_mesh, ep_enabled=False
        )
        assert not isinstance(norm, DTensor)
        norms.append(norm.item())
        optimizer.step()
    return Run(norms, parameters_of(model))


def _check(train: Callable[[], Run], max_norm: float) -> None:
    seen = twice(
        train, max_norm=max_norm, parameter_atol=1e-5,
        untouched=["torchtitan.distributed.utils:clip_grad_norm_"],
    )  # fmt: skip
    assert min(seen.torch.grad_norms) <= max_norm, seen.torch.grad_norms
    assert not any(call.startswith("reference") for call in seen.kernels.calls)
    everywhere: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, seen.fusedclip.grad_norms)
    assert all(norms == everywhere[0] for norms in everywhere)


@case(2)
def fsdp() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    _check(lambda: _train(_stage(0, mesh), dist.get_rank(), 10.0, None), 10.0)


@case(2)
def pipeline() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    stage = dist.get_rank()
    _check(lambda: _train(_stage(stage, None), stage, 16.0, mesh), 16.0)


@case(4)
def pipeline_of_fsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    stage = mesh.get_local_rank("pp")
    sharded, rank = mesh["fsdp"], dist.get_rank()
    _check(lambda: _train(_stage(stage, sharded), rank, 13.0, mesh["pp"]), 13.0)


def _parameters(whole: Sequence[Tensor], mesh: DeviceMesh) -> list[nn.Parameter]:
    placements = [Shard(0)] * mesh.ndim
    return [nn.Parameter(distribute_tensor(tensor, mesh, placements)) for tensor in whole]


@case(4)
def experts() -> None:
    """Dense parameters on all ranks, experts on a mesh of two dimensions: torchtitan's EP."""
    from torchtitan.distributed import utils as dist_utils

    dense_mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    expert_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))

    def train() -> Run:
        torch.manual_seed(0)
        shapes = [(9, 5), (6,), (8, 5, 3)]
        start = [torch.randn(shape) for shape in shapes]
        dense = _parameters(start[:2], dense_mesh)
        parameters = [*dense, *_parameters(start[2:], expert_mesh)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        norms = []
        for step in range(_STEPS):
            for p in parameters:
                gradient = torch.randn(p.shape) * (step + 1) * 0.2
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
            norm = dist_utils.clip_grad_norm_(
                list(parameters), 10.0, foreach=True, pp_mesh=None, ep_enabled=True
            )
            norms.append(norm.item())
            optimizer.step()
        return Run(norms, {str(i): p.full_tensor().detach() for i, p in enumerate(parameters)})

    _check(train, 10.0)
