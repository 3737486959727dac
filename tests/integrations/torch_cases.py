"""What ``test_torch`` runs on two ranks: DDP, FSDP2 and FSDP1 in a loop of one's own."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.processes import Case
from tests.integrations.harness import Run, parameters_of, twice

_STEPS = 8
_MAX_NORM = 10.0

CASES: dict[int, dict[str, Case]] = {2: {}}


def case(function: Case) -> Case:
    CASES[2][function.__name__] = function
    return function


def _model() -> nn.Sequential:
    torch.manual_seed(10)
    return nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 1))


def _train(model: nn.Module) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(dist.get_rank())  # its own batches
    norms = []
    for _ in range(_STEPS):
        inputs = torch.randn(16, 8, generator=generator)
        loss = (model(inputs).float() - 2 * inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if isinstance(model, FullyShardedDataParallel):
            norm = model.clip_grad_norm_(_MAX_NORM)
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
    return Run(norms, parameters_of(model))


def _check(make: Callable[[], nn.Module], half: bool = False) -> None:
    seen = twice(
        lambda: _train(make()), max_norm=_MAX_NORM, parameter_atol=1e-5,
        # Batches in bf16 amplify what differs in the last digits of fp32 parameters.
        norm_rtol=1e-3 if half else 1e-5, parameter_rtol=1e-3 if half else 1e-5,
    )  # fmt: skip
    assert min(seen.torch.grad_norms) <= _MAX_NORM, seen.torch.grad_norms
    everywhere: list[list[float]] = [[]] * 2
    dist.all_gather_object(everywhere, seen.fusedclip.grad_norms)
    assert everywhere[0] == everywhere[1]


def _sharded(precision: MixedPrecisionPolicy | None = None) -> nn.Module:
    model, mesh = _model(), init_device_mesh("cpu", (2,))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh, mp_policy=precision or MixedPrecisionPolicy())
    return model


@case
def ddp() -> None:
    _check(lambda: DistributedDataParallel(_model()))


@case
def fsdp2() -> None:
    _check(_sharded)


@case
def fsdp2_bf16() -> None:
    _check(lambda: _sharded(MixedPrecisionPolicy(torch.bfloat16)), half=True)


def _flat(use_orig_params: bool) -> nn.Module:
    model, cpu = _model(), torch.device("cpu")
    model[0] = FullyShardedDataParallel(model[0], use_orig_params=use_orig_params, device_id=cpu)
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=cpu)


@case
def fsdp1() -> None:
    _check(lambda: _flat(use_orig_params=True))


@case
def fsdp1_flat() -> None:
    _check(lambda: _flat(use_orig_params=False))
