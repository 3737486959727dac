"""Sharded training on GPUs: nccl, and shards offloaded to the CPU. One process and one GPU do."""

import math
import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedclip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(60),
]


@pytest.fixture
def nccl() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def _sharded(offload: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    model = nn.Linear(33, 17, device="cuda")
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)), offload_policy=policy)
    model(torch.randn(4, 33, device="cuda")).square().sum().backward()
    return model


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offloaded"])
@pytest.mark.parametrize("order", [2.0, math.inf, 1.0])
def test_fsdp2(nccl: None, offload: bool, order: float) -> None:
    model = _sharded(offload)
    grads = [p.grad.full_tensor().double().flatten().cpu() for p in model.parameters()]
    truth = torch.linalg.vector_norm(torch.cat(grads), order).item()
    # The process group makes one rank communicate: a mesh of one rank has nothing to add up.
    norm = fusedclip.clip_(model, truth / 2, order, process_group=dist.group.WORLD)
    assert norm.device.type == ("cpu" if offload else "cuda")
    assert norm.item() == pytest.approx(truth, rel=5e-7)
    for p, old in zip(model.parameters(), grads, strict=True):
        after = p.grad.full_tensor().flatten().cpu()
        torch.testing.assert_close(after, (old / 2).float())


def test_no_host_sync(nccl: None) -> None:
    model = _sharded(offload=False)
    fusedclip.clip_(model, 1.0, process_group=dist.group.WORLD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fusedclip.clip_(model, 1.0, process_group=dist.group.WORLD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
