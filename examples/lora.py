"""LoRA: a frozen linear map with a trained update of low rank, clipped at 1.0.

    python examples/lora.py

Only the adapters have gradients; the Clipper is given the model and takes what is there. It is
attached to the optimizer, so the loop has no line for clipping.
Source: Hu et al. 2021, arXiv 2106.09685.
"""

import torch
from torch import Tensor, nn

import fusedclip

WIDTH, RANK, STEPS = 64, 4, 60


class LoRALinear(nn.Module):
    """W x + B A x with W frozen and B = 0 at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.b = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.a.T @ self.b.T


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(WIDTH, RANK), nn.Tanh(), LoRALinear(WIDTH, RANK))
    target = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, fused=True)
    clipper = fusedclip.Clipper(model, max_norm=1.0)
    clipper.attach(optimizer)

    for step in range(STEPS):
        x = torch.randn(128, WIDTH)
        # The sum over features: its gradients are large enough that the first steps are clipped.
        loss = (model(x) - target(x).detach()).square().sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            grad_norm = clipper.last_norm.item()
            print(f"[Train Step {step}] loss={loss.item():.3f}, grad_norm={grad_norm:.3f}")


if __name__ == "__main__":
    main()
