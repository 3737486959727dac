"""The Trainer of Hugging Face Transformers, and those built on it: TRL's and ms-swift's.

They clip through ``torch.nn.utils``, so that ``fusedclip.patch()`` is all they need;
``FusedClipCallback`` is that and a ``Monitor`` in the Trainer's logs and checkpoints.
"""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fusedclip import call
from fusedclip.checks import checked_skip
from fusedclip.integrations.torch import Patch, patch
from fusedclip.monitor import Monitor
from fusedclip.parameters import known_names
from fusedclip.rule import Threshold

logger = logging.getLogger(__name__)


class FusedClipCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Clips with fusedclip while a Trainer trains, and logs what its monitor finds.

    torch's functions are patched from the beginning of ``train()`` to its end. Every training log
    gets the monitor's ``metrics()``; at the end summary and advice go to ``logging``, as a warning
    if anything stands out. The history is in the checkpoint's ``trainer_state.json`` and goes on
    when training is resumed. The Trainer tells its callbacks nothing of an exception: use it as a
    context manager where the process lives on after one.

    Args:
        window: steps that the monitor remembers.
        prefix: of the metrics' names in the logs.
        skip_above: as of ``fusedclip.patch``: a number or ``SkipSpikes()``.

    >>> callback = FusedClipCallback()
    >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    >>> print(callback.monitor.summary())

    Reporters that were added before it (W&B's, TensorBoard's, …) do not see what it adds to the
    logs; ``callback.add_to(trainer)``, in place of ``callbacks=[callback]``, puts it first.
    """

    def __init__(
        self,
        window: int = 512,
        prefix: str = "grad_clip/",
        *,
        skip_above: Threshold | None = None,
    ) -> None:
        self.skip_above = checked_skip(skip_above)
        self.window = window
        self.prefix = prefix
        self.monitor = Monitor(math.inf, window)
        self._names: dict[int, str] = {}
        self._patch: Patch | None = None
        self._checked = False

    def add_to(self, trainer: Trainer) -> "FusedClipCallback":
        """Make this the first callback, so that all others see what it adds to the logs."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def close(self) -> None:
        """Undo the patch; harmless when it is done already."""
        if self._patch is not None:
            self._patch.__exit__(None, None, None)
            self._patch = None
            call.observers.remove(self._monitor_of)

    def __enter__(self) -> "FusedClipCallback":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        self.close()  # of a training that ended with an exception
        limit = args.max_grad_norm
        self.monitor = Monitor(limit if limit and limit > 0 else math.inf, self.window)
        # Of a checkpoint without this callback nothing is there, and the Trainer expects something.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self.monitor.load_state_dict(restored(saved["attributes"]["history"]))
        self._names = {} if model is None else known_names(model)
        self._checked = False
        self._patch = patch(skip_above=self.skip_above)
        call.observers.append(self._monitor_of)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if not self._checked and self._patch is not None:
            self._checked = True
            if args.max_grad_norm and self.monitor.summary().steps == 0:
                warnings.warn(
                    "FusedClipCallback: this step was not clipped by torch.nn.utils.clip_grad_norm_"
                    ", so not by fusedclip either. DeepSpeed clips by itself (see "
                    "fusedclip.integrations.deepspeed); else this version of transformers or "
                    "accelerate is not one that fusedclip knows.",
                    stacklevel=2,
                )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if self._patch is None or logs is None or "loss" not in logs:
            return  # an evaluation's, or the summary of the training
        metrics = self.monitor.metrics(self.prefix)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.close()
        if state.is_world_process_zero:
            advice = self.monitor.advice()
            level = logging.WARNING if advice.findings else logging.INFO
            logger.log(level, "gradient clipping: %s\n%s", self.monitor.summary(), advice)

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``: of the norms of single parameters only those that a summary
        shows, of the largest step and of the last one that was NaN or infinite."""
        history, summary = self.monitor.state_dict(), self.monitor.summary()
        rows = history["tensor_norms"]
        if rows is not None:
            first = summary.steps - summary.window
            shown = {summary.max_step, summary.nonfinite_step} - {-1}
            kept = {str(step - first): rows[step - first] for step in shown}
            history["tensor_norms"] = {"shape": list(rows.shape), "rows": kept}
        return {
            "args": {"window": self.window, "prefix": self.prefix},
            "attributes": {"history": _to_lists(history)},
        }

    def _monitor_of(self, tensors: Sequence[Tensor]) -> Monitor | None:
        """The monitor, if these are parameters of the model that is trained."""
        if not any(id(tensor) in self._names for tensor in tensors):
            return None
        names = self.monitor.names
        if names is None or len(names) != len(tensors):
            self.monitor.names = [
                self._names.get(id(tensor), f"parameters[{i}]") for i, tensor in enumerate(tensors)
            ]
        return self.monitor


def restored(history: Mapping[str, Any]) -> dict[str, Any]:
    """The monitor's state from what JSON kept of it; tensor norms that it did not keep are NaN."""
    state: dict[str, Any] = _to_tensors(history)
    kept = state["tensor_norms"]
    if kept is not None:
        state["tensor_norms"] = torch.full(kept["shape"], math.nan, dtype=torch.float64)
        for place, row in kept["rows"].items():
            state["tensor_norms"][int(place)] = row
    return state


def _to_lists(state: Any) -> Any:
    """Tensors as lists, and numbers that JSON does not have as strings."""
    if isinstance(state, Tensor):
        return {"fp64": [_to_lists(value) for value in state.tolist()]}
    if isinstance(state, Mapping):
        return {key: _to_lists(value) for key, value in state.items()}
    return repr(state) if isinstance(state, float) and not math.isfinite(state) else state


def _to_tensors(state: Any) -> Any:
    if isinstance(state, Mapping):
        if state.keys() == {"fp64"}:
            return torch.tensor([float(value) for value in state["fp64"]], dtype=torch.float64)
        return {key: _to_tensors(value) for key, value in state.items()}
    return float(state) if isinstance(state, str) and state in ("nan", "inf", "-inf") else state
