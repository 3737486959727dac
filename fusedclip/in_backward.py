"""Clipping during backward: what ``Clipper.attach_to_backward`` returns.

Each gradient is clipped by its own norm as soon as it is complete, so that what runs behind it, an
optimizer in the backward pass for example, may use it up at once. The norm of all gradients is
known only when the last one has landed, and by then the first is gone: an exact global clip cannot
be had here.
"""

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fusedclip.call import Call
from fusedclip.pipeline import Record

if TYPE_CHECKING:
    from fusedclip.monitor import Monitor


_ATTRIBUTE = "_fusedclip_in_backward"  # of a parameter


class Clips(Protocol):
    """What it asks of a Clipper."""

    last_norm: Tensor | None

    @property
    def scope(self) -> str: ...
    @property
    def may_skip(self) -> bool: ...
    @property
    def max_norm(self) -> Any: ...
    @property
    def monitor(self) -> "Monitor | None": ...
    def every(self) -> Sequence[Tensor]: ...
    def listed(self) -> Sequence[Tensor]: ...
    def name_the_monitor(self) -> None: ...

    def call_for_one(self, max_norm: Any) -> Call:
        """Its settings, for one parameter, without the monitor."""


class BackwardAttachment:
    """A Clipper at work in ``backward()``, until ``remove()``."""

    def __init__(self, clipper: Clips, model: object) -> None:
        _check(clipper, model)
        self._clipper = clipper
        self._accumulating = False
        self._apart: set[int] = set()  # places that an optimizer keeps apart, in this backward
        self._norms: dict[int, Tensor] = {}  # that have landed in it, by place
        self._limits: dict[int, float | Tensor] = {}
        self._count = 0
        self._calls: dict[int, Call] = {}
        self._hooks: list[Any] = []
        self._attached: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._device: torch.device | None = None  # of a policy's memory
        seen: set[int] = set()
        for place, parameter in enumerate(clipper.every()):
            self._count = place + 1
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                # The hooks of a tensor are out of the garbage collector's sight: they hold nothing,
                # and the parameter keeps the attachment alive.
                hook = functools.partial(_landed, weakref.ref(self), place)
                register: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(register(hook))
                setattr(parameter, _ATTRIBUTE, self)
                self._attached.add(parameter)
        if not self._hooks:
            raise ValueError("parameters: none of them requires a gradient, so none will land")
        clipper.name_the_monitor()

    def __reduce__(self) -> Any:
        """A copy of a parameter, as of ``torch.save(model)``, does not clip."""
        return _nothing, ()

    def remove(self) -> None:
        """Detach; harmless when it is done already."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter in list(self._attached):
            if vars(parameter).get(_ATTRIBUTE) is self:
                delattr(parameter, _ATTRIBUTE)
        self._attached.clear()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """For each ``backward()`` of a step but the last: the gradients are not complete yet.

        >>> with handle.accumulating():
        ...     loss_of_a_part.backward()
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def forget(self) -> None:
        """Look at the policy's memory anew: another state was loaded."""
        self._calls = {}

    def landed(self, place: int, parameter: Tensor) -> None:
        """The gradient of a parameter is there. ``None``: an earlier hook has used it up."""
        if self._accumulating or parameter.grad is None:
            return
        if not self._norms:
            self._begin()
        if place in self._apart:
            return
        call = self._calls.get(place)
        if call is None:
            call = self._calls[place] = self._call(place, parameter.grad.device)
        if isinstance(call.max_norm, float):  # the same for all, and nothing to ask
            self._norms[place] = call.apply([parameter])
            return
        outcome = call.carry_out([parameter])
        self._norms[place], self._limits[place] = outcome.norms, outcome.threshold

    def _begin(self) -> None:
        """At the first gradient of a backward."""
        every, listed = self._clipper.every(), self._clipper.listed()
        self._apart = set()
        if len(listed) < len(every):
            kept = {id(p) for p in listed}
            self._apart = {place for place, p in enumerate(every) if id(p) not in kept}
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._end)

    def _call(self, place: int, device: torch.device) -> Call:
        limit = self._clipper.max_norm
        if hasattr(limit, "row"):
            if self._device not in (None, device):
                raise ValueError(
                    f"max_norm: a policy's memory is on {self._device}, and a gradient on {device} "
                    "has landed; give the parameters of each device a Clipper of their own"
                )
            self._device = device
            limit = limit.row(place, self._count, device)
        return self._clipper.call_for_one(limit)

    def _end(self) -> None:
        """At the end of a backward: the norms of its gradients are those of a step."""
        norms, limits = self._norms, self._limits
        self._norms, self._limits = {}, {}
        if not norms:
            return
        vector = _vector(norms, self._count, 0.0)
        self._clipper.last_norm = vector
        monitor = self._clipper.monitor
        if monitor is not None:
            rows = vector.to(torch.float64)
            limit = self._clipper.max_norm
            if limits:
                limit = _vector(limits, self._count, math.inf)
            record = Record(rows, vector, limit)
            monitor.finish(record)


def _landed(attachment: "weakref.ref[BackwardAttachment]", place: int, parameter: Tensor) -> None:
    """The hook."""
    own = attachment()
    if own is not None:
        own.landed(place, parameter)


def _nothing() -> None:
    return None


def _vector(values: dict[int, Any], count: int, missing: float) -> Tensor:
    """``[count]`` on the first one's device, ``missing`` where none has landed."""
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if not tensors:
        filled = [values.get(place, missing) for place in range(count)]
        return torch.tensor(filled, dtype=torch.float64, device="cpu")
    device, dtype = tensors[0].device, tensors[0].dtype
    if len(tensors) == count and all(t.device == device and t.dtype == dtype for t in tensors):
        return torch.stack([values[place].reshape(()) for place in range(count)])
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    none = torch.full((), missing, dtype=dtype, device=device)
    ordered = [values.get(place, none) for place in range(count)]
    return torch.stack([each.detach().to(device, dtype).reshape(()) for each in ordered])


def _check(clipper: Clips, model: object) -> None:
    if clipper.scope != "parameter":
        raise ValueError(
            f'scope: expected "parameter", got {clipper.scope!r}; during backward the norm of all '
            'gradients is not known yet, so each is clipped by its own: take scope="parameter" '
            "with a number or AdaGC(), or attach(optimizer), which clips when all are there"
        )
    if clipper.may_skip:
        raise ValueError(
            "skip_above: during backward it is too late to leave out a step, gradients that landed "
            "before may have been used; call attach(optimizer) instead"
        )
    limit = clipper.max_norm
    if hasattr(limit, "threshold") and not hasattr(limit, "row"):
        raise ValueError(
            f"max_norm: expected a number, a tensor or a policy of fusedclip's, got "
            f"{type(limit).__name__}, of which the memory of one parameter is not known"
        )
    if any(vars(p).get(_ATTRIBUTE) is not None for p in clipper.every()):
        raise ValueError(
            "parameters: a Clipper is attached to their backward already; remove() that one first, "
            "or every gradient would be clipped twice"
        )
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        raise ValueError(
            "model: DistributedDataParallel adds gradients up over ranks after they have landed, "
            "so they are not complete then; call attach(optimizer) instead"
        )
