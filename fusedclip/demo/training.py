"""One arm of the demonstration: the same model, batches and learning rate, its own clipping."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fusedclip
from fusedclip.demo.language_model import LanguageModel, batches

WARMUP = 150  # steps; the rate climbs linearly, through the edge of stability

Clip = Callable[[Sequence[nn.Parameter], float], Tensor]


def _only_measure(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    del max_norm
    return fusedclip.get_total_norm([p.grad for p in parameters if p.grad is not None])


ARMS: dict[str, Clip] = {
    "no clipping": _only_measure,
    "torch": nn.utils.clip_grad_norm_,
    "fusedclip": fusedclip.clip_,
}


@dataclass(frozen=True)
class Settings:
    # Found by trial on seeds 0 to 6: without clipping plain SGD at this rate ends in NaN between
    # steps 41 and 68; with this threshold it never does, and clips about two steps in three.
    steps: int = 300
    lr: float = 4.0
    max_norm: float = 0.5
    seed: int = 0
    device: str = "cpu"


@dataclass
class History:
    """What one arm went through, step by step."""

    arm: str
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping
    clip_seconds: float = 0.0

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss is NaN or infinite; training stops there."""
        return next((i for i, x in enumerate(self.losses) if not math.isfinite(x)), None)

    @property
    def final_loss(self) -> float:
        """The mean of the last 20 steps."""
        last = self.losses[-20:]
        return sum(last) / len(last) if last else math.nan

    @property
    def worst_spike(self) -> float:
        """The furthest that a finite loss rose above the lowest loss before it."""
        worst, lowest = 0.0, math.inf
        for loss in filter(math.isfinite, self.losses):
            worst, lowest = max(worst, loss - lowest), min(lowest, loss)
        return worst

    def steps_above(self, max_norm: float) -> int:
        return sum(not norm <= max_norm for norm in self.norms)


def learning_rate(settings: Settings, step: int) -> float:
    return settings.lr * min(1.0, (step + 1) / WARMUP)


def log_line(step: int, loss: float, grad_norm: float, lr: float) -> str:
    """``[Train Step 123] loss=2.14, grad_norm=0.97, lr=2e-5``"""
    rate = f"{lr:.3g}".replace("e-0", "e-")
    return f"[Train Step {step}] loss={loss:.2f}, grad_norm={grad_norm:.2f}, lr={rate}"


def train(
    arm: str,
    text: Tensor,
    settings: Settings,
    history: History,
    on_step: Callable[[int], None],
) -> None:
    """Train one arm, adding to ``history`` after every step, until the end or the first bad loss.

    ``history`` is the caller's, so that an interrupted run keeps what it has.
    """
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    model = LanguageModel().to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=settings.lr)
    clip = ARMS[arm]
    stream = batches(text, settings.seed, device)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        symbols, targets = next(stream)
        loss = model.loss(symbols, targets)
        torch.autograd.backward(loss)
        _wait_for(device)
        begin = time.perf_counter()
        norm = clip(parameters, settings.max_norm)
        _wait_for(device)
        history.clip_seconds += time.perf_counter() - begin
        optimizer.step()
        optimizer.zero_grad()
        history.losses.append(loss.item())
        history.norms.append(norm.item())
        on_step(step)
        if history.diverged_at is not None:
            break


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":  # so that the clock sees the device's work
        torch.cuda.synchronize(device)
