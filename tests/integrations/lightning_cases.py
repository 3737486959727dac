"""What ``test_lightning`` runs on two ranks: the Trainer's strategies, DDP and FSDP2."""

import os
from contextlib import nullcontext
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from fusedclip.integrations.lightning import FusedClipCallback
from tests.distributed.processes import Case
from tests.integrations.harness import Run, parameters_of, twice

_MAX_NORM = 12.0
_STEPS = 8

CASES: dict[int, dict[str, Case]] = {2: {}}


def case(function: Case) -> Case:
    CASES[2][function.__name__] = function
    return function


class _Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.body = nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 1))
        self.norms: list[float] = []  # before clipping, by hand
        self.trained: dict[str, Tensor] = {}

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        inputs, target = batch
        return (self.body(inputs) - target).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for p in self.parameters()]
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        self.norms.append(torch.cat([grad.flatten() for grad in whole]).double().norm().item())

    def on_train_end(self) -> None:
        self.trained = parameters_of(self)


class _Sharded(_Regression):
    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            for module in (self.body[0], self.body):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


def _train(module: _Regression, strategy: Any, callbacks: list[FusedClipCallback]) -> Run:
    inputs = torch.randn(16 * _STEPS, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    data = TensorDataset(inputs, 2 * inputs.sum(1, keepdim=True))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, callbacks=callbacks, max_epochs=1,
        gradient_clip_val=_MAX_NORM, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=16))
    return Run(module.norms, module.trained)


def _check(module: type[_Regression], strategy: Any) -> None:
    """torchrun's variables, as Lightning looks for them; the group is there already."""
    rank = str(dist.get_rank())
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    callback = FusedClipCallback()
    current: list[FusedClipCallback] = []
    seen = twice(
        lambda: _train(module(), strategy(), current), max_norm=_MAX_NORM, parameter_atol=1e-5,
        patch=lambda: nullcontext(current.append(callback)),
    )  # fmt: skip
    assert min(seen.torch.grad_norms) <= _MAX_NORM, seen.torch.grad_norms
    summary = callback.monitor.summary()
    assert summary.steps == _STEPS
    assert abs(summary.max / max(seen.torch.grad_norms) - 1) < 1e-5
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, (seen.fusedclip.grad_norms, str(summary)))
    assert everywhere[0] == everywhere[1]


@case
def ddp() -> None:
    _check(_Regression, DDPStrategy)


@case
def fsdp2() -> None:
    _check(_Sharded, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
