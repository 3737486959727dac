"""Mixed precision with clipping in the same pass: ``python examples/amp.py``.

float16 with a loss scale where there is a GPU. On a CPU it is bfloat16, which needs no scale but
works with one, so the loop is the same.
"""

import argparse

import torch
from torch import nn

import fusedclip


def main() -> None:
    parser = argparse.ArgumentParser(prog="amp.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-norm", type=float, default=1.0)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = fusedclip.amp.GradScaler(device, max_norm=arguments.max_norm)

    inputs = torch.randn(256, 64, device=device)
    targets = inputs.sum(1, keepdim=True)
    for step in range(arguments.steps):
        with torch.autocast(device, dtype):
            loss = nn.functional.mse_loss(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # unscales, skips an overflow, clips and steps
        scaler.update()
        optimizer.zero_grad()
        assert scaler.last_norm is not None
        print(
            f"[Train Step {step}] loss={loss.item():.3f}, "
            f"grad_norm={scaler.last_norm.item():.3f}, scale={scaler.get_scale():.0f}"
        )


if __name__ == "__main__":
    main()
