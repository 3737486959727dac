"""Clipping inside ``optimizer.step()``: what ``Clipper.attach`` returns."""

import functools
import math
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedclip.call import Clipped, listeners
from fusedclip.leaving_out import Undo, leave_out, on_device, version
from fusedclip.parameters import all_of
from fusedclip.pipeline import Outcome, Unscale

# What torch's fused optimizers and GradScaler agree on: attributes of the optimizer for one step.
_FOR_ONE_STEP = ("grad_scale", "found_inf")

_ATTRIBUTE = "_fusedclip_attachment"


class Clips(Protocol):
    """What an attachment asks of a Clipper."""

    def every(self) -> Sequence[Tensor]:
        """All of its parameters."""

    def listed(self) -> Sequence[Tensor]:
        """Those that are not of a group that is kept apart."""

    @property
    def scope(self) -> str: ...
    @property
    def nonfinite(self) -> str: ...
    @property
    def may_skip(self) -> bool: ...

    def carry_out(self, unscale: Unscale | None, *, write: bool) -> Outcome:
        """Clip in place, or say what to multiply by."""


class Attachment:
    """A Clipper at work in an optimizer, until ``remove()``."""

    def __init__(self, clipper: Clips, optimizer: torch.optim.Optimizer, allow_sync: bool) -> None:
        if _ATTRIBUTE in vars(optimizer):
            raise ValueError(
                "optimizer: a Clipper is attached to it already; remove() that one first, or every "
                "step would clip twice"
            )
        self._clipper = clipper
        self._optimizer = weakref.ref(optimizer)
        self._fused = on_device(optimizer)
        self._heard: list[tuple[weakref.ref[Tensor], int]] = []  # clipped gradients, version
        self._heard_of_own = False  # that was this Clipper, for another optimizer
        self._skip: Tensor | None = None  # what it said of the step then
        self._warned = False
        self._undo: Undo | None = None  # of a step that is left out
        self._check_parameters(optimizer)
        if clipper.may_skip and not self._fused and not allow_sync:
            raise ValueError(
                f"{type(optimizer).__name__} cannot leave out a step on the device with "
                "fused=False; use a fused optimizer (fused=True), or allow_sync=True, which waits "
                "for the norm at every step"
            )
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._guarded = weakref.ref(self._guard(optimizer))
        _warn_copies_of(optimizer)
        listeners.add(self)
        setattr(optimizer, _ATTRIBUTE, self)  # it lives as long as the optimizer

    def remove(self) -> None:
        """Detach; harmless when it is done already."""
        self._hook.remove()
        listeners.discard(self)
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).get(_ATTRIBUTE) is self:
            delattr(optimizer, _ATTRIBUTE)
            vars(optimizer).pop("__getstate__", None)
            step = getattr(vars(optimizer).get("step"), "__func__", None)
            if step is not None and step is self._guarded():
                del vars(optimizer)["step"]

    def heard(self, clipped: Clipped) -> None:
        """Remember which gradients another clip has rescaled.

        A clip with an infinite threshold was only a look at the norm.
        """
        limit = clipped.threshold
        optimizer = self._optimizer()
        at_work = _at_work.get(self._clipper)
        if at_work is self or optimizer is None:
            return
        if at_work is None and isinstance(limit, float) and limit == math.inf:
            return
        own = {id(p.grad) for p in all_of(optimizer) if p.grad is not None}
        grads = [grad for grad in clipped.gradients() if at_work is not None or id(grad) in own]
        self._heard = [(weakref.ref(grad), version(grad)) for grad in grads]
        self._heard_of_own, self._skip = at_work is not None, clipped.skip

    def _guard(self, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
        """``optimizer.step`` with what was set for one step gone after it, whatever happens."""
        inner = optimizer.step

        @functools.wraps(inner)
        def step(_: torch.optim.Optimizer, *arguments: Any, **options: Any) -> Any:
            own = vars(optimizer)
            before = {name: own[name] for name in _FOR_ONE_STEP if name in own}
            try:
                return inner(*arguments, **options)
            finally:
                if self._undo is not None:
                    self._undo()
                    self._undo = None
                for name in _FOR_ONE_STEP:
                    own.pop(name, None)
                own.update(before)  # GradScaler's, who takes them away

        # Bound, since learning rate schedulers wrap it in turn and expect a method.
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        return step

    def _before_step(
        self, optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """torch's step pre-hook: ``arguments[0]`` is the optimizer."""
        closure = arguments[1] if len(arguments) > 1 else options.get("closure")
        if closure is None:
            self._clip(optimizer)
            return None

        def clipped(*own: Any, **more: Any) -> Any:
            loss = closure(*own, **more)
            self._clip(optimizer)
            return loss

        if len(arguments) > 1:
            return (arguments[0], clipped, *arguments[2:]), options
        return arguments, {**options, "closure": clipped}

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        if self._was_clipped(optimizer):
            if not self._heard_of_own:
                self._warn()
            elif self._skip is not None:
                self._undo = leave_out(optimizer, self._skip)
            return
        self._check_parameters(optimizer)
        if not self._clipper.may_skip and not self._shares_with(optimizer):
            return  # all of its groups are kept apart
        _at_work[self._clipper] = self
        try:
            self._clip_or_fold(optimizer)
        finally:
            del _at_work[self._clipper]

    def _clip_or_fold(self, optimizer: torch.optim.Optimizer) -> None:
        clipper = self._clipper
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler's
        unscale = None
        if scale is not None:  # the optimizer will divide by it
            unscale = Unscale(scale.double().reciprocal().float(), write=False)
        one = clipper.scope == "global" and clipper.nonfinite != "zero"
        fold = self._fused and one and self._owns_exactly(optimizer)
        outcome = clipper.carry_out(unscale, write=not fold)
        if fold:
            self._fold(optimizer, outcome, scale)
        if outcome.skip is not None:
            self._undo = leave_out(optimizer, outcome.skip)

    def _was_clipped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether another clip has rescaled a gradient as it is now.

        One that was accumulated into, zeroed or replaced since then is another gradient.
        """
        heard, self._heard = self._heard, []
        listed = self._clipper.listed() if self._heard_of_own else all_of(optimizer)
        own = {id(p.grad) for p in listed if p.grad is not None}
        return any(
            (grad := reference()) is not None and id(grad) in own and version(grad) == written
            for reference, written in heard
        )

    def _fold(
        self, optimizer: torch.optim.Optimizer, outcome: Outcome, scale: Tensor | None
    ) -> None:
        """Hand the coefficient to the optimizer, which applies it as it reads the gradients."""
        assert outcome.coefficients is not None
        divisor = outcome.coefficients.reciprocal().reshape(())
        if scale is not None:
            divisor = divisor * scale.to(divisor.device)
        optimizer.grad_scale = divisor.to(torch.float32)  # type: ignore[attr-defined]

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            "fusedclip: the gradients were clipped before optimizer.step(), so the attached "
            "Clipper left them alone; take away one of the two",
            stacklevel=5,
        )

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        own = {id(p) for p in self._clipper.every()}
        if not any(id(p) in own for p in all_of(optimizer)):
            raise ValueError(
                "optimizer: it has none of the Clipper's parameters; was the model moved or built "
                "anew after the optimizer was made?"
            )

    def _shares_with(self, optimizer: torch.optim.Optimizer) -> bool:
        own = {id(p) for p in self._clipper.listed()}
        return any(id(p) in own for p in all_of(optimizer))

    def _owns_exactly(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the coefficient would scale the Clipper's gradients and no others."""
        with_grad = [p for p in self._clipper.listed() if p.grad is not None]
        own = {id(p) for p in all_of(optimizer) if p.grad is not None}
        return bool(own) and own == {id(p) for p in with_grad}


# Which attachment a Clipper is clipping for, while it does.
_at_work: "weakref.WeakKeyDictionary[Clips, Attachment]" = weakref.WeakKeyDictionary()


def _warn_copies_of(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers leave hooks behind when they are copied or pickled: say so."""
    inner = type(optimizer).__getstate__

    def getstate(own: torch.optim.Optimizer) -> Any:
        warnings.warn(
            "fusedclip: a copy of this optimizer does not clip, its attached Clipper stays behind; "
            "attach one to the copy",
            stacklevel=2,
        )
        return inner(own)

    # copy and pickle ask the object, not its class.
    vars(optimizer)["__getstate__"] = types.MethodType(getstate, optimizer)
