"""FSDP2 with one global gradient norm: ``torchrun --nproc-per-node=2 examples/fsdp2.py``.

Two CPU processes do; where there are GPUs, each process takes one. Every rank clips its own shards,
and one all-reduce of one number makes their norms one.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedclip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-norm", type=float, default=1.0)
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ["LOCAL_WORLD_SIZE"]
    )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(64, 1)).to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    torch.manual_seed(1 + dist.get_rank())  # each rank has its own data
    inputs = torch.randn(32, 64, device=device)
    targets = inputs.sum(1, keepdim=True)
    norms = []
    for step in range(arguments.steps):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        norms.append(fusedclip.clip_(model, arguments.max_norm))
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"[Train Step {step}] loss={loss.item():.3f}, grad_norm={norms[-1].item():.3f}")

    # Each rank for itself: the same to the last bit. A transfer by torch as the last thing before
    # the end could still be in the hands of gloo's thread there, and abort the process.
    total = torch.stack(norms).double().sum().item()
    print(f"rank {dist.get_rank()}: the norms of all steps add up to {total.hex()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
