"""Leaving out a step of an optimizer: a clip has said so, on the device.

torch's fused optimizers look at ``found_inf`` themselves and leave everything as it is. Others see
no gradient, which they do nothing for; the host has to know the verdict then.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fusedclip.call import Clipped, listeners
from fusedclip.parameters import all_of

Undo = Callable[[], None]


def on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it can leave out a step without the host's help: ``fused=True``."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def leave_out(optimizer: torch.optim.Optimizer, skip: Tensor) -> Undo:
    """Make the step to come change nothing if ``skip`` is true; call the result after the step.

    Waits for ``skip`` unless ``on_device(optimizer)``.
    """
    if on_device(optimizer):
        own = vars(optimizer)
        known = own.get("found_inf")  # GradScaler's
        found = skip.to(torch.float32)
        if known is not None:
            found = torch.maximum(known.to(found.device), found)
        own["found_inf"] = found
        return lambda: _put_back(own, known)
    if not bool(skip):
        return lambda: None
    hidden = [(p, p.grad) for p in all_of(optimizer)]
    for parameter, _ in hidden:
        parameter.grad = None

    def show() -> None:
        for parameter, grad in hidden:
            parameter.grad = grad

    return show


def _put_back(own: dict[str, Any], known: Tensor | None) -> None:
    own.pop("found_inf", None)
    if known is not None:
        own["found_inf"] = known


def version(grad: Tensor) -> int:
    """How often the tensor was written; torch does not count for inference tensors."""
    return 0 if grad.is_inference() else grad._version


class SkippedSteps:
    """Leaves out the steps that clips have judged, of whatever optimizer makes them.

    For trainings that clip by torch's names and step by themselves. From its making to ``remove()``
    it hears every clip and sees every ``optimizer.step()`` of the process.
    """

    def __init__(self) -> None:
        self._judged: list[tuple[weakref.ref[Tensor], int]] = []  # gradient, version
        self._skip: Tensor | None = None
        self._undo: Undo | None = None
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        listeners.add(self)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        listeners.discard(self)

    def heard(self, clipped: Clipped) -> None:
        if clipped.skip is not None:
            self._skip = clipped.skip
            self._judged = [(weakref.ref(g), version(g)) for g in clipped.gradients()]

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._after()  # of a step that raised
        own = {id(p.grad) for p in all_of(optimizer) if p.grad is not None}
        judged = any(
            (grad := reference()) is not None and id(grad) in own and version(grad) == written
            for reference, written in self._judged
        )
        if judged and self._skip is not None:
            self._undo = leave_out(optimizer, self._skip)

    def _after(self, *_: Any) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
