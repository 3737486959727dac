"""Lightning: Trainer, Fabric, and ``FusedClipCallback`` where the norm is dropped or refused."""

import functools
import logging
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedclip
from fusedclip.integrations.lightning import FusedClipCallback
from tests.distributed.processes import failures, run_job
from tests.integrations.harness import Run, counted_kernels, parameters_of, twice
from tests.integrations.record import verifies

_MAX_NORM = 12.0
_STEPS = 12
_RATE = 1e-2

_verified = functools.partial(verifies, "Lightning", "lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


class _Regression(lightning.LightningModule):
    """Gradients start above the threshold and end below it."""

    def __init__(self, fused: bool = False, attach: float | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self._fused = fused
        self._attach = attach
        self.norms: list[float] = []  # before clipping, by hand

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        inputs, target = batch
        return (self.body(inputs).float() - target).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=_RATE, fused=self._fused)
        if self._attach is not None:
            fusedclip.Clipper(self, self._attach).attach(optimizer)
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(_norm_of(self))


def _norm_of(module: nn.Module) -> float:
    return math.sqrt(
        sum(
            p.grad.double().square().sum().item() for p in module.parameters() if p.grad is not None
        )
    )


def _data() -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(16 * _STEPS, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, 2 * inputs.sum(1, keepdim=True)), batch_size=16)


class _Logger(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((-1 if step is None else step, dict(metrics)))


def _trainer(**options: Any) -> lightning.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "barebones": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 4,
    }  # fmt: skip
    return lightning.Trainer(**{**defaults, **options})


def _fit(*, fused: bool = False, attach: float | None = None, **options: Any) -> Run:
    module = _Regression(fused, attach)
    _trainer(**options).fit(module, _data())
    assert len(module.norms) == _STEPS // options.get("accumulate_grad_batches", 1)
    return Run(module.norms, parameters_of(module))


def _mixed(scaled: bool = True) -> MixedPrecision:
    """Under a loss scale; for ``precision="16-mixed"`` on a CPU the Trainer takes bf16 instead."""
    if not scaled:
        return MixedPrecision("bf16-mixed", "cpu")
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@_verified(what="Trainer with `gradient_clip_val`")
def test_trainer(precision: str) -> None:
    # Of bf16 gradients torch rounds the norm to bf16, 2^-8 of it, and parameters of 8 bits are then
    # rounded the other way.
    half = precision == "bf16-true"
    twice(
        lambda: _fit(gradient_clip_val=_MAX_NORM, precision=precision),
        max_norm=_MAX_NORM,
        norm_rtol=2.0**-7 if half else 1e-5,
        parameter_rtol=2.0**-6 if half else 1e-5,
        parameter_atol=4e-3 if half else 1e-5,
    )


@_verified(what="Trainer that accumulates, under a loss scale")
def test_trainer_accumulates_under_a_loss_scale() -> None:
    def train() -> Run:
        return _fit(gradient_clip_val=_MAX_NORM, plugins=[_mixed()], accumulate_grad_batches=2)

    twice(train, max_norm=_MAX_NORM, parameter_atol=1e-5)


@_verified(what='Trainer with `gradient_clip_algorithm="value"`')
def test_trainer_clips_by_value() -> None:
    def train() -> Run:
        return _fit(gradient_clip_val=0.05, gradient_clip_algorithm="value")

    torch.manual_seed(0)
    plain = train()
    torch.manual_seed(0)
    with fusedclip.patch():
        fused = train()
    assert fused.grad_norms == plain.grad_norms  # torch's results, bit for bit
    assert all(torch.equal(fused.parameters[k], v) for k, v in plain.parameters.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@_verified(what="Fabric's `clip_gradients`")
def test_fabric(precision: str) -> None:
    def train() -> Run:
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=_RATE))
        norms = []
        for inputs, target in fabric.setup_dataloaders(_data()):
            optimizer.zero_grad()
            fabric.backward((model(inputs).float() - target).square().mean())
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=_MAX_NORM).item())
            optimizer.step()
        return Run(norms, parameters_of(module))

    twice(train, max_norm=_MAX_NORM, parameter_atol=1e-5)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run_job("tests.integrations.lightning_cases", 2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ddp", marks=_verified(what="`FusedClipCallback`: DDP")),
        pytest.param("fsdp2", marks=_verified(what="`FusedClipCallback`: FSDP2")),
    ],
)
def test_on_two_ranks(outcomes: dict[str, list[str]], name: str) -> None:
    problem = failures(outcomes.get(name, ["no rank ran it"]))
    if problem:
        pytest.fail(problem, pytrace=False)


class TestCallback:
    @_verified(what="`FusedClipCallback` with `gradient_clip_val`")
    def test_takes_over_what_the_trainer_asks_for(self) -> None:
        made: list[FusedClipCallback] = []

        def train(callbacks: Any) -> Run:
            return _fit(gradient_clip_val=_MAX_NORM, callbacks=callbacks())

        def with_callback() -> list[FusedClipCallback]:
            made.append(FusedClipCallback())
            return made[-1:]

        current: list[Any] = [list]
        runs = twice(
            lambda: train(current[0]),
            max_norm=_MAX_NORM,
            patch=lambda: nullcontext(current.__setitem__(0, with_callback)),
            untouched=["lightning.pytorch.plugins:Precision.clip_grad_by_norm"],
            parameter_atol=1e-5,
        )
        monitor = made[0].monitor
        summary = monitor.summary()
        assert summary.steps == _STEPS
        assert summary.last_norm == pytest.approx(runs.torch.grad_norms[-1], rel=1e-5)
        assert summary.max == pytest.approx(max(runs.torch.grad_norms), rel=1e-5)
        assert summary.max_norm == _MAX_NORM
        assert {part.name for part in summary.top} <= set(runs.torch.parameters)

    @_verified(
        what="`FusedClipCallback` and `Clipper.attach`: mixed precision with a fused optimizer"
    )
    @pytest.mark.parametrize("scaled", [True, False], ids=["fp16 and a scaler", "bf16"])
    def test_mixed_precision_with_a_fused_optimizer(self, scaled: bool) -> None:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            _fit(fused=True, plugins=[_mixed(scaled)], gradient_clip_val=_MAX_NORM)

        torch.manual_seed(0)
        # The same with an optimizer that Lightning does clip.
        expected = _fit(plugins=[_mixed(scaled)], gradient_clip_val=_MAX_NORM)
        torch.manual_seed(0)
        unclipped = _fit(plugins=[_mixed(scaled)])
        for options in (
            {"callbacks": [FusedClipCallback(max_norm=_MAX_NORM)]},
            {"attach": _MAX_NORM},
        ):
            torch.manual_seed(0)
            with counted_kernels() as kernels:
                actual = _fit(fused=True, plugins=[_mixed(scaled)], **options)
            assert len(kernels.calls) >= _STEPS
            for name, value in expected.parameters.items():
                torch.testing.assert_close(
                    actual.parameters[name], value, rtol=1e-4, atol=1e-4, msg=name
                )
            assert any(
                not torch.allclose(actual.parameters[name], value, rtol=1e-3, atol=1e-3)
                for name, value in unclipped.parameters.items()
            ), "clipping made no difference"
            if "callbacks" in options:
                summary = options["callbacks"][0].monitor.summary()
                assert summary.steps == _STEPS
                # By hand they are seen before they are unscaled.
                scale = 64.0 if scaled else 1.0
                assert summary.last_norm == pytest.approx(actual.grad_norms[-1] / scale, rel=1e-5)
                assert 0.0 < summary.clipped < 1.0

    def test_metrics_reach_the_logger_and_advice_the_log(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        logger = _Logger()
        callback = FusedClipCallback(prefix="clip/")
        with caplog.at_level(logging.INFO):
            run = _fit(gradient_clip_val=_MAX_NORM, callbacks=[callback], logger=logger)
        logged = [(step, line) for step, line in logger.lines if "clip/norm" in line]
        assert [step for step, _ in logged] == [3, 7, 11]  # Lightning counts from 0
        for step, line in logged:
            assert line["clip/norm"] == pytest.approx(run.grad_norms[step], rel=1e-5)
            assert line["clip/max_norm"] == _MAX_NORM
        assert str(callback.monitor.summary()) in caplog.text
        assert str(callback.monitor.advice()) in caplog.text

    @pytest.mark.filterwarnings("error:FusedClipCallback")
    def test_accumulated_batches_are_one_step(self) -> None:
        logger = _Logger()
        callback = FusedClipCallback(max_norm=_MAX_NORM)
        options = {"accumulate_grad_batches": 3, "log_every_n_steps": 2}
        run = _fit(callbacks=[callback], logger=logger, **options)
        assert callback.monitor.summary().steps == len(run.grad_norms) == 4
        logged = [line["grad_clip/norm"] for _, line in logger.lines if "grad_clip/norm" in line]
        assert logged == pytest.approx([run.grad_norms[1], run.grad_norms[3]], rel=1e-5)

    def test_a_resumed_run_goes_on_counting(self, tmp_path: Path) -> None:
        def callback() -> FusedClipCallback:
            return FusedClipCallback(fusedclip.ZClip(warmup=3))

        torch.manual_seed(0)
        whole = callback()
        _trainer(callbacks=[whole], max_epochs=2).fit(_Regression(), _data())
        torch.manual_seed(0)
        first = callback()
        trainer = _trainer(callbacks=[first])
        trainer.fit(_Regression(), _data())
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        second = callback()
        trainer = _trainer(callbacks=[second], max_epochs=2)
        trainer.fit(_Regression(), _data(), ckpt_path=tmp_path / "half.ckpt")
        assert second.monitor.summary() == whole.monitor.summary()
        assert second.monitor.summary().steps == 2 * _STEPS
        assert first.monitor.summary().steps == _STEPS

    def test_everything_is_undone_also_by_an_exception(self) -> None:
        class Failing(_Regression):
            def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
                if batch_index == 2:
                    raise KeyError("a failing step")
                return super().training_step(batch, batch_index)

        for module in (_Regression(), Failing()):
            for options in ({"gradient_clip_val": _MAX_NORM}, {}):
                callback = FusedClipCallback(None if options else _MAX_NORM)
                trainer = _trainer(callbacks=[callback], **options)
                raises = isinstance(module, Failing)
                with pytest.raises(KeyError) if raises else nullcontext():
                    trainer.fit(module, _data())
                assert "clip_grad_by_norm" not in vars(trainer.precision_plugin)
                for optimizer in trainer.optimizers:
                    assert not [name for name in vars(optimizer) if "fusedclip" in name]
                assert callback.monitor.summary().steps == (2 if raises else _STEPS)

    def test_two_thresholds_are_refused(self) -> None:
        with pytest.raises(ValueError, match="give the threshold to one of the two"):
            _fit(gradient_clip_val=_MAX_NORM, callbacks=[FusedClipCallback(2.0)])

    def test_nothing_to_clip_is_said_once(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _fit(callbacks=[FusedClipCallback()])
        said = [w for w in caught if "nothing was clipped by norm" in str(w.message)]
        assert len(said) == 1

    def test_watching_only(self) -> None:
        torch.manual_seed(0)
        plain = _fit()
        torch.manual_seed(0)
        callback = FusedClipCallback(max_norm=math.inf)
        watched = _fit(callbacks=[callback])
        for name, value in plain.parameters.items():
            assert torch.equal(watched.parameters[name], value)
        assert callback.monitor.summary().steps == _STEPS

    def test_a_plugin_that_clips_by_itself_is_left_alone(self) -> None:
        class Own(lightning.pytorch.plugins.Precision):
            def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
                pass

        with (
            pytest.warns(UserWarning, match="nothing was clipped by norm"),
            pytest.warns(UserWarning, match="Own clips in a way of its own"),
        ):
            _fit(gradient_clip_val=_MAX_NORM, plugins=[Own()], callbacks=[FusedClipCallback()])

    def test_manual_optimization_of_two_optimizers(self) -> None:
        class Manual(_Regression):
            automatic_optimization = False

            def training_step(self, batch: list[Tensor], batch_index: int) -> None:
                loss = super().training_step(batch, batch_index)
                optimizers = self.optimizers()
                self.manual_backward(loss)
                for optimizer in optimizers:
                    self.clip_gradients(optimizer, 0.5, "norm")
                    optimizer.step()
                    optimizer.zero_grad()

            def configure_optimizers(self) -> Any:
                layers = self.body[0], self.body[2]
                return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in layers]

        logger = _Logger()
        callback = FusedClipCallback()
        module = Manual()
        trainer = _trainer(callbacks=[callback], logger=logger, log_every_n_steps=2)
        trainer.fit(module, _data())
        assert [clipper.monitor.summary().steps for clipper in callback.clippers] == [_STEPS] * 2
        names = [clipper.monitor.names for clipper in callback.clippers]
        assert names == [["body.0.weight", "body.0.bias"], ["body.2.weight", "body.2.bias"]]
        keys = {key for _, line in logger.lines for key in line}
        assert {"grad_clip/optimizer_0/norm", "grad_clip/optimizer_1/norm"} <= keys
