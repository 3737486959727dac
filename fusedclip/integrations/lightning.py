"""A callback for Lightning's Trainer: fusedclip clips, and a monitor gets the norms.

Lightning clips by ``torch.nn.utils.clip_grad_norm_`` and drops what it returns; with mixed
precision and a fused optimizer it refuses to clip. ``fusedclip.patch()`` is enough where the norm
is not needed, and for Fabric, whose ``clip_gradients`` returns it.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedclip.checks import checked_skip
from fusedclip.clipper import Clipper
from fusedclip.leaving_out import SkippedSteps
from fusedclip.monitor import Monitor
from fusedclip.parameters import names_in, parameter_list
from fusedclip.rule import Threshold

if TYPE_CHECKING:
    from fusedclip.attachment import Attachment

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.utilities import rank_zero_info
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback
    from pytorch_lightning.plugins import Precision
    from pytorch_lightning.utilities import rank_zero_info


class FusedClipCallback(Callback):  # type: ignore[misc]
    """Clips with fusedclip in a Lightning Trainer and watches the norms.

    Without ``max_norm`` it takes over what ``Trainer(gradient_clip_val=...)`` asks for, or
    ``LightningModule.clip_gradients``. With ``max_norm`` it clips inside ``optimizer.step()``, see
    ``Clipper.attach``: any precision and any optimizer, fused ones under a loss scale included.

    Each optimizer has a ``Clipper`` with a ``Monitor`` while ``fit`` runs and after it. Every
    ``log_every_n_steps`` of the Trainer the monitor's metrics go to its loggers, at the end of
    training its summary and advice to the log of the process with rank 0. Histories are saved in
    the Trainer's checkpoints.

    Args:
        max_norm: a number, a 0-dim tensor or a policy (``AutoClip``, ``ZClip``; for one optimizer);
            ``inf`` watches only. ``None``: what the Trainer has.
        window: how many steps each monitor remembers.
        nonfinite: with ``max_norm``, as of ``Clipper``.
        prefix: of the names of the metrics.
        skip_above: as of ``Clipper``: a number or ``SkipSpikes()`` (for one optimizer). Without
            waiting for ``fused=True``; for others every step waits for the norm.

    >>> trainer = L.Trainer(gradient_clip_val=1.0, callbacks=[FusedClipCallback()])
    >>> trainer = L.Trainer(precision="16-mixed", callbacks=[FusedClipCallback(max_norm=1.0)])
    """

    def __init__(
        self,
        max_norm: Threshold | None = None,
        *,
        window: int = 512,
        nonfinite: str = "propagate",
        prefix: str = "grad_clip/",
        skip_above: Threshold | None = None,
    ) -> None:
        self.clippers: list[Clipper] = []  # of each optimizer of the Trainer
        self._max_norm = max_norm
        self._window = window
        self._nonfinite = nonfinite
        self._prefix = prefix
        self._skip_above = checked_skip(skip_above)
        self._skipped: SkippedSteps | None = None
        self._attachments: list[Attachment] = []
        self._precision: Any = None  # the plugin of which a method is replaced
        self._loaded: list[dict[str, Any]] | None = None
        self._logged_step = 0
        self._warned = False

    @property
    def monitor(self) -> Monitor | None:
        """That of the first optimizer; ``None`` before ``fit``."""
        return self.clippers[0].monitor if self.clippers else None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._max_norm is not None and trainer.gradient_clip_val:
            raise ValueError(
                f"max_norm: Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip as "
                "well; give the threshold to one of the two"
            )
        self.clippers = [self._clipper(optimizer, pl_module) for optimizer in trainer.optimizers]
        for clipper, state in zip(self.clippers, self._loaded or (), strict=False):
            clipper.load_state_dict(state)
        self._loaded = None
        if self._max_norm is not None:
            pairs = zip(self.clippers, trainer.optimizers, strict=True)
            self._attachments = [
                clipper.attach(optimizer, allow_sync=clipper.skip_above is not None)
                for clipper, optimizer in pairs
            ]
        else:
            self._take_over(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self._logged_step:
            return  # the batch was accumulated
        if not self._warned and all(clipper.last_norm is None for clipper in self.clippers):
            self._warned = True
            warnings.warn(
                "FusedClipCallback: the optimizer made a step and nothing was clipped by norm; "
                "give max_norm to the callback or gradient_clip_val to the Trainer",
                stacklevel=2,
            )
        if step % trainer.log_every_n_steps == 0:
            self._logged_step = step
            pl_module.log_dict(self._metrics())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for number, clipper in enumerate(self.clippers):
            monitor = clipper.monitor
            assert monitor is not None
            of = f" of optimizer {number}" if len(self.clippers) > 1 else ""
            rank_zero_info(f"Gradient norms{of}: {monitor.summary()}\n{monitor.advice()}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Undo what ``on_fit_start`` did; the monitors stay."""
        for attachment in self._attachments:
            attachment.remove()
        self._attachments = []
        if self._skipped is not None:
            self._skipped.remove()
            self._skipped = None
        if self._precision is not None:
            del self._precision.clip_grad_by_norm
            self._precision = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        return {"clippers": [clipper.state_dict() for clipper in self.clippers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["clippers"]

    def _clipper(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> Clipper:
        own = parameter_list(optimizer)
        limit = math.inf if self._max_norm is None else self._max_norm
        monitor = Monitor(
            limit if isinstance(limit, (int, float, torch.Tensor)) else math.inf,
            self._window,
            names=names_in(module, own),
        )
        return Clipper(
            optimizer,
            limit,
            nonfinite=self._nonfinite,
            monitor=monitor,
            skip_above=self._skip_above,
        )

    def _take_over(self, trainer: Any) -> None:
        """Replace the precision plugin's method, by which Lightning clips, with the Clipper's."""
        precision = trainer.precision_plugin
        if type(precision).clip_grad_by_norm is not Precision.clip_grad_by_norm:
            warnings.warn(
                f"FusedClipCallback: {type(precision).__name__} clips in a way of its own, which "
                "is left alone; give max_norm to the callback instead",
                stacklevel=2,
            )
            return
        clippers = dict(zip(map(id, trainer.optimizers), self.clippers, strict=True))

        def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
            clipper = clippers[id(getattr(optimizer, "optimizer", optimizer))]
            clipper.max_norm = float(clip_val)
            clipper.carry_out()

        if self._skip_above is not None:
            self._skipped = SkippedSteps()
        self._precision = precision
        precision.clip_grad_by_norm = clip_grad_by_norm

    def _metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for number, clipper in enumerate(self.clippers):
            assert clipper.monitor is not None
            of = f"optimizer_{number}/" if len(self.clippers) > 1 else ""
            metrics |= clipper.monitor.metrics(self._prefix + of)
        return metrics
