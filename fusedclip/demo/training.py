"""The demonstration: a model, a learning rate that needs clipping, and three arms to compare."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import compare
from fusedclip.demo.language_model import LanguageModel, batches

# Found by trial on seeds 0 to 6: without clipping plain SGD at this rate ends in NaN between steps
# 41 and 68; with this threshold it never does, and clips about two steps in three.
LR = 4.0
MAX_NORM = 0.5
WARMUP = (
    150  # steps in which the rate grows linearly, to where training without clipping is unstable
)

ARMS: Mapping[str, compare.Clip | None] = {
    "no clipping": None,
    "torch": nn.utils.clip_grad_norm_,
    "fusedclip": fusedclip.clip_,
}


def learning_rate(lr: float, step: int) -> float:
    return lr * min(1.0, (step + 1) / WARMUP)


def train(run: compare.Run, text: Tensor, lr: float) -> None:
    """One arm: the same model, batches and learning rate, its own clipping."""
    model = LanguageModel().to(run.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    stream = batches(text, run.seed, run.device)
    for step in run:
        rate = learning_rate(lr, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        symbols, targets = next(stream)
        loss = model.loss(symbols, targets)
        torch.autograd.backward(loss)
        run.clip_(parameters)
        optimizer.step()
        optimizer.zero_grad()
        run.report(loss, lr=rate)
