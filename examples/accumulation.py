"""Gradient accumulation: clip once for each step of the optimizer, not for each batch.

``python examples/accumulation.py``. The gradients of the micro-batches add up to that of the whole
batch, and it is that one whose norm counts: clipping the parts would change its direction. The run
is compared with one on whole batches.
"""

import argparse

import torch
from torch import Tensor, nn

import fusedclip


def train(steps: int, micro_batches: int, max_norm: float) -> list[float]:
    """The gradient norm of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs = torch.randn(64, 32)
    norms: list[Tensor] = []
    for step in range(steps):
        total = 0.0
        for part in inputs.chunk(micro_batches):
            loss = nn.functional.mse_loss(model(part), part.sum(1, keepdim=True))
            (loss / micro_batches).backward()  # the mean over the whole batch
            total += loss.item() / micro_batches
        norms.append(fusedclip.clip_(model, max_norm))
        optimizer.step()
        optimizer.zero_grad()
        print(f"[Train Step {step}] loss={total:.3f}, grad_norm={norms[-1].item():.3f}")
    return [norm.item() for norm in norms]


def main() -> None:
    parser = argparse.ArgumentParser(prog="accumulation.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--max-norm", type=float, default=1.0)
    arguments = parser.parse_args()
    parts = train(arguments.steps, arguments.micro_batches, arguments.max_norm)
    whole = train(arguments.steps, 1, arguments.max_norm)
    difference = max(abs(a / b - 1) for a, b in zip(parts, whole, strict=True))
    print(f"norms of {arguments.micro_batches} micro-batches and of whole batches: "
          f"within {difference:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
