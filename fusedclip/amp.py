"""Mixed precision: unscale, check for overflow and clip in one pass.

torch's ``scaler.unscale_(optimizer)`` reads and writes every gradient, and ``clip_grad_norm_``
reads them twice and writes them once: 5N bytes. Here each value is multiplied by 1 / scale as it is
loaded, the norm says whether any overflowed, and one write applies 1 / scale and the clip at once:
3N. With torch's fused optimizers, which divide by ``grad_scale`` themselves, the clip goes into
that divisor and costs one read: N.

The scale, its growth and backoff, skipped steps and checkpoints are torch's own code. What is
replaced is the private method in which torch's scaler walks over the gradients,
``_unscale_grads_``, and for fused optimizers ``_check_inf_per_device``.

torch looks for gradients that are not finite, fusedclip at their norm. That is the same, since
finite gradients have a finite norm, except where the norm itself exceeds the range of its type
(3.4e38 in fp32): such a step is skipped as well.
"""

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedclip.call import Call
from fusedclip.checks import checked_max_norm, checked_nonfinite, checked_norm_type
from fusedclip.parameters import kept_apart
from fusedclip.pipeline import Unscale

# As `_unscale_grads_` returns it. One norm, so one verdict: torch adds the entries up, and its
# fused optimizers compare the sum with 1.
_FoundInf = dict[torch.device, Tensor]


class GradScaler(torch.amp.GradScaler):
    r"""A ``torch.amp.GradScaler`` that also clips, by the global norm of the unscaled gradients.

    .. math:: g \leftarrow \frac{g}{s} \cdot
        \min\left(1, \frac{max\_norm}{\lVert g / s \rVert + 10^{-6}}\right)

    with :math:`s` the loss scale and :math:`g` all gradients of one optimizer as one vector.

    ``step(optimizer)`` unscales, clips and steps. ``unscale_(optimizer)`` may be called before, to
    look at the gradients: it unscales **and clips**, and ``step`` does not again. Do not clip a
    second time. Several optimizers are clipped one by one, each by its own norm.

    When a gradient is not finite, the step is skipped and the scale backed off, as torch does; the
    gradients are then unscaled and not clipped, so that inf and NaN can be found where they are.
    Optimizers with ``_step_supports_amp_scaling`` (``fused=True``) unscale and clip as they read;
    the divisor, scale / coefficient, is float32 (they see zeros where it overflows), and gradients
    that are not finite stay scaled.

    With ``enabled=False`` (bfloat16 needs no scale) it clips, in ``step`` or ``unscale_`` as above,
    and steps. A closure is then clipped each time it is called.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: torch's.
        max_norm, norm_type, process_group, backend: as of ``fusedclip.clip_``, with
            ``norm_type > 0``. ``max_norm`` is an attribute too and may be changed between steps.
        nonfinite: as of ``fusedclip.clip_``, for ``enabled=False`` only.

    Raises:
        TypeError, ValueError: a bad argument or gradient, float16 gradients among them, before
            anything is modified. Everything else is raised by torch, in torch's words.

    Source: ``torch.amp.GradScaler``; Micikevicius et al. 2018, arXiv 1710.03740.

    >>> scaler = fusedclip.amp.GradScaler("cuda", max_norm=1.0)
    >>> scaler.scale(loss).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    >>> scaler.last_norm
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        max_norm: float | Tensor,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )
        checked_max_norm(max_norm)
        checked_nonfinite(nonfinite)
        self.max_norm = max_norm
        self._order = _checked_order(norm_type)
        self._nonfinite = nonfinite
        self._process_group = process_group
        self._backend = backend
        self._last_norm: Tensor | None
        self._forget_norms()

    @property
    def last_norm(self) -> Tensor | None:
        """The norm of the unscaled gradients before they were clipped last: a 0-dim tensor, no host
        sync; NaN or inf when that step was skipped; ``None`` before the first."""
        return self._last_norm

    def last_norm_of(self, optimizer: Optimizer) -> Tensor | None:
        """``last_norm`` of one of several optimizers."""
        return self._norms.get(optimizer)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscale and clip the gradients of ``optimizer``, once a step; ``step`` does it otherwise.

        Raises:
            RuntimeError: it was called before in this step, as torch does.
        """
        if self._enabled:
            super().unscale_(optimizer)
        elif optimizer not in self._clipped:
            self._clip_only(optimizer)
            self._clipped.add(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale and clip, unless ``unscale_`` did, and step, unless a gradient is not finite.

        Arguments go to ``optimizer.step``; closures are refused unless the scaler is disabled.
        """
        if not self._enabled:
            return self._clip_and_step(optimizer, *args, **kwargs)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            return super().step(optimizer, *args, **kwargs)
        clips = isinstance(self.max_norm, Tensor) or self.max_norm != math.inf
        if clips and "grad_scaler" in inspect.signature(optimizer.step).parameters:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step(grad_scaler=...) unscales by itself and would "
                "not clip; use one that takes grad_scale and found_inf, as torch's fused ones do"
            )
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            # torch deletes them only when step() returns.
            vars(optimizer).pop("grad_scale", None)
            vars(optimizer).pop("found_inf", None)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(new_scale)
        self._clipped.clear()

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> _FoundInf:
        del found_inf  # where this clip's lives depends on the gradients
        unscale = Unscale(inv_scale, allow_fp16)
        found = _found_apart(optimizer, unscale, self._apart())
        self._remember(optimizer, self._call("unclipped").apply(optimizer, unscale))
        return _all_found(unscale, found)

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        """torch's ``step`` asks here before it hands the scale to an optimizer that unscales.

        It sets ``grad_scale`` to the product of the scale and what is there already, which is where
        the clip goes: g / (scale / coefficient). Nothing but the norm is computed.
        """
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        divisor = getattr(optimizer, "grad_scale", 1.0)  # the user's own
        inverse = (scale.double() * divisor).reciprocal().float()
        unscale = Unscale(inverse, write=False)
        apart = _found_apart(optimizer, unscale, self._apart())
        # Where groups are kept apart one divisor does not serve all: then in place.
        outcome = self._call("unclipped").carry_out(optimizer, unscale, write=apart is not None)
        norm, coefficient = outcome.norms, outcome.coefficients
        found = _all_found(unscale, apart)
        if found and coefficient is not None:
            stretch = coefficient.reciprocal().float().reshape(()).to(scale.device)
            optimizer.grad_scale = stretch * divisor  # type: ignore[attr-defined]
        self._remember(optimizer, norm)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

    def _clip_and_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if args and callable(args[0]):
            args = (self._clipping(optimizer, args[0]), *args[1:])
        elif kwargs.get("closure") is not None:
            kwargs["closure"] = self._clipping(optimizer, kwargs["closure"])
        else:
            self.unscale_(optimizer)
        self._clipped.discard(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def _clipping(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = closure()
            self._clip_only(optimizer)
            return loss

        return evaluate

    def _clip_only(self, optimizer: Optimizer) -> None:
        self._remember(optimizer, self._call(self._nonfinite).apply(optimizer))

    def _call(self, nonfinite: str) -> Call:
        limit = checked_max_norm(self.max_norm)
        group, backend = self._process_group, self._backend
        return Call(limit, self._order, nonfinite, process_group=group, backend=backend)

    def _apart(self) -> Call:
        """For groups that are kept apart: they are unscaled, and an overflow there is one."""
        return Call(math.inf, self._order, "unclipped", backend=self._backend)

    def _remember(self, optimizer: Optimizer, norm: Tensor) -> None:
        self._last_norm = norm
        self._norms[optimizer] = norm

    def _forget_norms(self) -> None:
        self._last_norm = None
        self._norms: weakref.WeakKeyDictionary[Optimizer, Tensor] = weakref.WeakKeyDictionary()
        self._clipped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # since the last step

    def __getstate__(self) -> dict[str, Any]:
        """As torch's: between iterations only. Norms belong to the optimizers of this process."""
        own = ("_last_norm", "_norms", "_clipped")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_norms()


def unscale_and_clip_(
    scaler: torch.amp.GradScaler,
    optimizer: Optimizer,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *,
    nonfinite: str = "propagate",
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """``scaler.unscale_(optimizer)`` and ``clip_`` in one pass, for any ``torch.amp.GradScaler``.

    ``scaler.step(optimizer)`` and ``scaler.update()`` follow as usual. A disabled scaler: it clips.

    Args:
        scaler: torch's, or one derived from it; not ``fusedclip.amp.GradScaler``, which clips.
        max_norm, norm_type, process_group, backend: as of ``fusedclip.clip_``; ``norm_type > 0``.
        nonfinite: as of ``fusedclip.clip_``, for a disabled scaler only; else gradients that are
            not finite are unscaled and not clipped, and ``scaler.step`` skips the step.

    Returns:
        The norm of the unscaled gradients before clipping, as ``fusedclip.clip_`` does.

    Raises:
        RuntimeError, AssertionError: as ``scaler.unscale_``, called twice or without a scale.
        TypeError, ValueError: a bad argument or gradient; nothing was modified.

    >>> scaler.scale(loss).backward()
    >>> norm = fusedclip.amp.unscale_and_clip_(scaler, optimizer, max_norm=1.0)
    >>> scaler.step(optimizer)
    >>> scaler.update()
    """
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
    if isinstance(scaler, GradScaler):
        raise TypeError("scaler: this one clips by itself; call scaler.unscale_(optimizer)")
    limit, order = checked_max_norm(max_norm), _checked_order(norm_type)
    checked_nonfinite(nonfinite)
    if not scaler.is_enabled():
        plain = Call(limit, order, nonfinite, process_group=process_group, backend=backend)
        return plain.apply(optimizer)
    call = Call(limit, order, "unclipped", process_group=process_group, backend=backend)
    norms = []

    def unscale_grads_(
        optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> _FoundInf:
        unscale = Unscale(inv_scale, allow_fp16)
        found = _found_apart(
            optimizer, unscale, Call(math.inf, order, "unclipped", backend=backend)
        )
        norms.append(call.apply(optimizer, unscale))
        return _all_found(unscale, found)

    # torch's own unscale_, its checks and its bookkeeping, around this walk over the gradients.
    scaler._unscale_grads_ = unscale_grads_  # type: ignore[method-assign]
    try:
        scaler.unscale_(optimizer)
    finally:
        del scaler._unscale_grads_
    return norms[0]


def _found_apart(optimizer: Optimizer, unscale: Unscale, call: Call) -> Tensor | None:
    """The verdict on groups with ``"clip": False``, unscaled as ``unscale`` says; ``None``: none.

    They are looked at first, so that half precision is refused before anything is written.
    """
    apart = [p for p in kept_apart(optimizer) if p.grad is not None]
    if not apart:
        return None
    own = replace(unscale)
    call.carry_out(apart, own, write=unscale.write)
    return own.found_inf


def _all_found(unscale: Unscale, apart: Tensor | None) -> _FoundInf:
    """The verdict as torch's scaler keeps it."""
    found = unscale.found_inf
    if found is None:
        found = apart
    elif apart is not None:
        found = torch.maximum(found, apart.to(found.device))
    return {} if found is None else {found.device: found}


def _checked_order(norm_type: float) -> float:
    order = checked_norm_type(norm_type)
    if order <= 0.0:
        raise ValueError(
            f"norm_type: expected an order > 0, got {order}; such a norm may be finite though a "
            "gradient is not, and the overflow would go unseen"
        )
    return order
