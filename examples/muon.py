"""Muon beside AdamW: the clip is for AdamW's gradients alone.

``python examples/muon.py``. An update of Muon is orthogonalised, so its length does not depend on
the gradient's; the matrices' gradients would only crowd out AdamW's in a common norm. The group of
the matrices has ``"clip": False``: it is neither counted nor scaled.
"""

import argparse

import torch
from torch import nn

import fusedclip


def main() -> None:
    parser = argparse.ArgumentParser(prog="muon.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-norm", type=float, default=1.0)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    hidden = [model[0].weight, model[2].weight]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
    muon = torch.optim.Muon([{"params": hidden, "clip": False}], lr=0.02)
    adamw = torch.optim.AdamW(others, lr=1e-2, fused=True)
    clipper = fusedclip.Clipper(model, arguments.max_norm, monitor=True)
    for optimizer in (muon, adamw):
        clipper.attach(optimizer)

    inputs = torch.randn(256, 32)
    targets = 3.0 * inputs.sum(1, keepdim=True).tanh()
    largest = 0.0
    for step in range(arguments.steps):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        every = fusedclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        largest = max(largest, every.item())
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        print(clipper.monitor.log_line(step, loss=loss.item()))
    print(f"largest norm of what is clipped: {clipper.monitor.summary().max:.4f}")
    print(f"largest norm of all gradients: {largest:.4f}")


if __name__ == "__main__":
    main()
