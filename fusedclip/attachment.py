"""Clipping inside ``optimizer.step()``: what ``Clipper.attach`` returns."""

import functools
import math
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedclip import clip
from fusedclip.errors import NonfiniteGradientError
from fusedclip.gradients import parameter_list
from fusedclip.pipeline import Unscale, decide_gathered

if TYPE_CHECKING:
    from fusedclip.clipper import Clipper

# What torch's fused optimizers and GradScaler agree on: attributes of the optimizer for one step.
_FOR_ONE_STEP = ("grad_scale", "found_inf")

_ATTRIBUTE = "_fusedclip_attachment"


class Attachment:
    """A Clipper at work in an optimizer, until ``remove()``."""

    def __init__(
        self, clipper: "Clipper", optimizer: torch.optim.Optimizer, allow_sync: bool
    ) -> None:
        if _ATTRIBUTE in vars(optimizer):
            raise ValueError(
                "optimizer: a Clipper is attached to it already; remove() that one first, or every "
                "step would clip twice"
            )
        self._clipper = clipper
        self._optimizer = weakref.ref(optimizer)
        self._fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._clipped_by_others = False
        self._warned = False
        self._saved_grads: list[tuple[Tensor, Tensor | None]] = []
        self._check_parameters(optimizer)
        if clipper.nonfinite == "skip" and not (self._fused and clipper.scope == "global"):
            if not allow_sync:
                raise ValueError(
                    f'nonfinite="skip": {type(optimizer).__name__} cannot skip a step on the '
                    f"device with scope={clipper.scope!r} and fused={self._fused}; use a fused "
                    'optimizer and scope="global", or allow_sync=True, which waits for the norm at '
                    "every step"
                )
            self._fused = False
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._guarded = weakref.ref(self._guard(optimizer))
        clip.listeners.add(self)
        setattr(optimizer, _ATTRIBUTE, self)  # it lives as long as the optimizer

    def remove(self) -> None:
        """Detach; harmless when it is done already."""
        self._hook.remove()
        clip.listeners.discard(self)
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).get(_ATTRIBUTE) is self:
            delattr(optimizer, _ATTRIBUTE)
            step = getattr(vars(optimizer).get("step"), "__func__", None)
            if step is not None and step is self._guarded():
                del vars(optimizer)["step"]

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
                for parameter, grad in self._saved_grads:
                    parameter.grad = grad
                self._saved_grads = []
                for name in _FOR_ONE_STEP:
                    own.pop(name, None)
                own.update(before)  # GradScaler's, who takes them away

        # Bound, as learning rate schedulers expect who wrap it in turn.
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        return step

    def _before_step(
        self, optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """torch's step pre-hook: ``arguments[0]`` is the optimizer."""
        closure = arguments[1] if len(arguments) > 1 else options.get("closure")
        if closure is None:
            self._clip(optimizer, self._fused)
            return None

        def clipped(*own: Any, **more: Any) -> Any:
            loss = closure(*own, **more)
            self._clip(optimizer, self._fused)
            return loss

        if len(arguments) > 1:
            return (arguments[0], clipped, *arguments[2:]), options
        return arguments, {**options, "closure": clipped}

    def _clip(self, optimizer: torch.optim.Optimizer, fused: bool) -> None:
        if self._clipped_by_others:
            self._clipped_by_others = False
            self._warn()
            return
        self._check_parameters(optimizer)
        clipper = self._clipper
        fused = fused and clipper.scope == "global" and clipper.nonfinite != "zero"
        if fused and self._owns_exactly(optimizer) and self._fold(optimizer):
            return
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "the gradients are still multiplied by the loss scale and this Clipper clips in "
                "place; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if clipper.nonfinite == "skip":
            self._clip_or_skip(optimizer)
        else:
            self._quietly(lambda: clipper.clip_with_(clipper.nonfinite))

    def _fold(self, optimizer: torch.optim.Optimizer) -> bool:
        """Hand the coefficient to the optimizer; False where there is no gradient."""
        clipper = self._clipper
        tensors = parameter_list(clipper.parameters)
        grads = clip.gather_all(tensors, clipper.norm_type, clipper.process_group, clipper.backend)
        if grads.empty:
            return False
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler's
        unscale = None
        if scale is not None:
            inv_scale = scale.double().reciprocal().float().to(grads.device, non_blocking=True)
            unscale = Unscale(inv_scale, torch.zeros((), device=grads.device))
        with clipper.recording(tensors, grads) as record:
            clipper.last_norm, coefficient = decide_gathered(
                clipper.parameters, grads, clipper.max_norm, clipper.norm_type, clipper.nonfinite,
                clipper.process_group, unscale, record,
            )  # fmt: skip
        divisor = coefficient.reciprocal().reshape(())
        if scale is not None:
            divisor = divisor * scale.to(divisor.device)
        optimizer.grad_scale = divisor.to(torch.float32)  # type: ignore[attr-defined]
        if clipper.nonfinite == "skip":
            bad = (~clipper.last_norm.isfinite()).to(torch.float32)
            known = getattr(optimizer, "found_inf", None)
            found = bad if known is None else torch.maximum(known.to(bad.device), bad)
            optimizer.found_inf = found  # type: ignore[attr-defined]
        return True

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip in place; a bad step sees no gradient at all. Waits for the norm."""
        try:
            self._quietly(lambda: self._clipper.clip_with_("error"))
        except NonfiniteGradientError:
            self._saved_grads = [(p, p.grad) for p in parameter_list(optimizer)]
            for parameter, _ in self._saved_grads:
                parameter.grad = None

    def _quietly(self, call: Callable[[], object]) -> None:
        """Without hearing one's own clip."""
        try:
            call()
        finally:
            self._clipped_by_others = False

    def heard(self, tensors: Sequence[Tensor], max_norm: float | Tensor) -> None:
        """Somebody has clipped; with an infinite threshold it was a look at the norm."""
        optimizer = self._optimizer()
        if optimizer is None or (isinstance(max_norm, float) and max_norm == math.inf):
            return
        own = {id(p) for p in parameter_list(optimizer)}
        if any(id(tensor) in own for tensor in tensors):
            self._clipped_by_others = True

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
        own = {id(p) for p in parameter_list(self._clipper.parameters)}
        if not any(id(p) in own for p in parameter_list(optimizer)):
            raise ValueError(
                "optimizer: it has none of the Clipper's parameters; was the model moved or built "
                "anew after the optimizer was made?"
            )

    def _owns_exactly(self, optimizer: torch.optim.Optimizer) -> bool:
        """The coefficient that a fused optimizer is given scales all of its gradients."""
        with_grad = [p for p in parameter_list(self._clipper.parameters) if p.grad is not None]
        own = {id(p) for p in parameter_list(optimizer) if p.grad is not None}
        return own == {id(p) for p in with_grad}
