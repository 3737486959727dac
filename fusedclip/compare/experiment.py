"""The experiment itself: what the training function is given, and the arms one by one."""

import contextlib
import difflib
import importlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedclip.compare.history import Comparison, History, Settings
from fusedclip.functional import clip_
from fusedclip.parameters import Parameters

Clip = Callable[[Any, float], Tensor]
Train = Callable[["Run"], object]

# None is the control arm: the norm is measured and nothing is clipped.
ARMS: Mapping[str, Clip | None] = {"no clipping": None, "fusedclip": clip_}


class Finished(Exception):
    """The arm is over. ``compare`` catches it, so a loop that is not its own may let it pass."""


class Run:
    """One arm, as the training function sees it.

    Attributes:
        arm: its name.
        max_norm: its threshold, ``inf`` in the control arm.
        steps, seed, device: as in ``Settings``. Python's, numpy's and torch's generators are seeded
            with ``seed`` beforehand; generators of your own take it from here.
    """

    def __init__(
        self, settings: Settings, history: History, clip: Clip, on_step: Callable[[History], None]
    ) -> None:
        self.arm = history.arm
        self.max_norm = history.max_norm
        self.steps = settings.steps
        self.seed = settings.seed
        self.device = torch.device(settings.device)
        self._history = history
        self._clip = clip
        self._on_step = on_step
        self._norms: list[Tensor] = []  # of this step
        self._seconds = 0.0  # in clipping, of this step

    def __iter__(self) -> Iterator[int]:
        """The steps, 0 to ``steps - 1``, as far as the arm gets."""
        while not self.finished:
            before = len(self._history.losses)
            yield before
            if len(self._history.losses) == before:
                raise RuntimeError(f"step {before} of {self.arm!r} ended without run.report(loss)")

    @property
    def finished(self) -> bool:
        """``steps`` were reported, or a loss that is NaN or infinite."""
        losses = self._history.losses
        return len(losses) >= self.steps or (bool(losses) and not math.isfinite(losses[-1]))

    def clip_(self, parameters: Parameters) -> Tensor:
        """Clips as this arm does, or only measures; returns the norm before clipping.

        Called several times in a step (a network each), the largest norm is the step's.
        """
        self._check()
        self._wait()
        begin = time.perf_counter()
        norm = self._clip(parameters, self.max_norm)
        self._wait()
        self._seconds += time.perf_counter() - begin
        self._norms.append(norm)
        return norm

    def report(
        self,
        loss: float | Tensor,
        *,
        lr: float | None = None,
        grad_norm: float | Tensor | None = None,
    ) -> None:
        """Ends a step.

        Args:
            loss: of the step, a number or a tensor with one element.
            lr: the learning rate, for the log.
            grad_norm: before clipping, when the loop clips by itself with ``max_norm``.
        """
        self._check()
        norms = [grad_norm] if grad_norm is not None else self._norms
        if not norms:
            raise RuntimeError(
                "run.report() without a gradient norm: call run.clip_(parameters) between "
                "backward() and step(), or pass grad_norm="
            )
        values = [_value(norm) for norm in norms]
        self._history.norms.append(math.nan if any(map(math.isnan, values)) else max(values))
        self._history.losses.append(_value(loss))
        self._history.rates.append(lr)
        if self._norms:
            self._history.clip_seconds.append(self._seconds)
        self._norms, self._seconds = [], 0.0
        self._on_step(self._history)

    def _check(self) -> None:
        if self.finished:
            raise Finished(f"{self.arm}: {len(self._history.losses)} steps were reported")

    def _wait(self) -> None:
        if self.device.type == "cuda":  # so that the clock sees the device's work
            torch.cuda.synchronize(self.device)


def compare(
    train: Train,
    settings: Settings,
    arms: Mapping[str, Clip | None] = ARMS,
    on_step: Callable[[History], None] = lambda history: None,
) -> Comparison:
    """Runs ``train`` once an arm.

    Args:
        train: builds model, data and optimizer anew and trains; see the module's text.
        settings: threshold, steps, seed and device.
        arms: by name ``function(parameters, max_norm) -> norm`` with the contract of ``clip_``, or
            None for the control arm, which comes first.
        on_step: called after each step with the history of the arm.

    Returns:
        The histories. After Ctrl-C those that there are, with ``interrupted``.

    Raises:
        ValueError: the first arm is not the control arm.
        RuntimeError: a step without norm or report, or a function that reported none.
    """
    if not arms or next(iter(arms.values())) is not None:
        raise ValueError(f"arms: expected the control arm, None, first, got {list(arms)}")
    histories: list[History] = []
    interrupted = False
    try:
        for name, clip in arms.items():
            history = History(name, math.inf if clip is None else settings.max_norm)
            histories.append(history)
            _seed(settings.seed)
            with contextlib.suppress(Finished):
                train(Run(settings, history, clip or clip_, on_step))
            if not history.losses:
                raise RuntimeError(f"{name}: the training function never called run.report()")
    except KeyboardInterrupt:
        interrupted = True
    return Comparison(settings, [h for h in histories if h.losses], interrupted)


def _value(number: float | Tensor) -> float:
    return float(number.item() if isinstance(number, Tensor) else number)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def load_function(name: str) -> Train:
    """The function ``module:function``; modules of the current folder count.

    Raises:
        ValueError: it is not of that form, or there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name or module_name.endswith(".py") or "/" in module_name:
        raise ValueError(
            f"expected module:function, such as train:main for main() in train.py, got {name!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # one that the module itself imports
        raise ValueError(
            f"no module named {error.name!r}, neither in {os.getcwd()} nor installed"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        close = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"module {module_name!r} has no function {function_name!r}{hint}")
    found: Train = function
    return found
