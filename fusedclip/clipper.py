"""A clip with its settings: called by hand, or attached to an optimizer."""

import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedclip.attachment import Attachment
from fusedclip.backends import select
from fusedclip.call import Call
from fusedclip.checks import (
    CHOICES,
    checked_max_norm,
    checked_nonfinite,
    checked_norm_type,
    checked_skip,
    is_policy,
)
from fusedclip.in_backward import BackwardAttachment
from fusedclip.parameters import (
    Named,
    Parameters,
    all_of,
    kept_apart,
    parameter_list,
    parameter_names,
)
from fusedclip.pipeline import Outcome, Unscale
from fusedclip.rule import GLOBAL, Segments, Threshold

if TYPE_CHECKING:
    from fusedclip.monitor import Monitor

SCOPES = ("global", "group", "parameter")
NONFINITE = (*CHOICES, "skip")


class Clipper:
    r"""Clips the gradients of one model, always in the same way.

    Args:
        model_or_parameters: as in ``clip_``, or a list of optimizers. A module or an optimizer is
            asked anew at each call, so parameters may be frozen or added later. A parameter group
            with ``"clip": False``, of these optimizers or of one that this is attached to, is
            neither counted nor scaled.
        max_norm: a number >= 0, a 0-dim tensor, or a policy (``AutoClip``, ``ZClip``, ``AdaGC``,
            ``SkipSpikes``) that follows the norms of each scope. A policy is for one Clipper.
        norm_type: p of the p-norm.
        nonfinite: as in ``clip_``; ``"skip"``, for an attached Clipper, leaves out the step.
        scope: ``"global"`` clips all gradients as one vector, ``"parameter"`` each by its own norm,
            ``"group"`` each parameter group of an optimizer, by the key ``max_norm`` of the group
            where it has one.
        monitor: keep the norms of every step and every parameter, in the same pass: ``True`` or a
            ``Monitor``, then ``clipper.monitor``.
        process_group: also add up over the ranks of this group.
        backend: as in ``clip_``.
        skip_above: for an attached Clipper: leave out a step whose norm, that of all gradients, is
            NaN or larger than this: a number, a 0-dim tensor or a policy (``SkipSpikes``).

    >>> clipper = fusedclip.Clipper(model, max_norm=1.0)
    >>> clipper.attach(optimizer)  # from now on optimizer.step() clips
    """

    def __init__(
        self,
        model_or_parameters: Parameters | Sequence[torch.optim.Optimizer],
        max_norm: Threshold,
        *,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        scope: str = "global",
        monitor: "bool | Monitor" = False,
        process_group: Any = None,
        backend: str = "auto",
        skip_above: Threshold | None = None,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
        checked_nonfinite(nonfinite, NONFINITE)
        if isinstance(model_or_parameters, Iterator):  # it can be read only once
            model_or_parameters = list(model_or_parameters)
        limit = max_norm if is_policy(max_norm) else checked_max_norm(max_norm)
        self.parameters = model_or_parameters
        # The optimizers whose parameters they are, and those that it is attached to.
        self._own = _optimizers(model_or_parameters)
        self._in_backward: BackwardAttachment | None = None
        self._attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.max_norm = limit
        self.norm_type = checked_norm_type(norm_type)
        self.nonfinite = nonfinite
        self.scope = scope
        self.process_group = process_group
        self.backend = backend
        self.skip_above = checked_skip(skip_above)
        self.last_norm: Tensor | None = None
        self.monitor = _monitor(monitor, limit)
        select.resolve(backend)

    def clip_(self) -> Tensor:
        """Clip now.

        Returns:
            The norm before clipping, 0-dim; with ``scope="group"`` ``[num_groups]``, with
            ``scope="parameter"`` ``[num_parameters]``, 0 where there is no gradient. On the first
            gradient's device; no host sync.
        """
        if self.may_skip:
            raise RuntimeError(
                "this Clipper leaves out a step of the optimizer, so it needs one: call "
                "attach(optimizer) instead of clip_()"
            )
        return self.carry_out().norms

    def carry_out(self, unscale: Unscale | None = None, *, write: bool = True) -> Outcome:
        """``clip_``, and all that it comes to, for an optimizer's step.

        Args:
            unscale: the gradients are of a scaled loss.
            write: False leaves the gradients to the caller, who applies the coefficients.
        """
        parameters, segments = self._selected()
        outcome = self._call(segments).carry_out(parameters, unscale, write=write)
        self.last_norm = outcome.norms
        return outcome

    def every(self) -> Sequence[Tensor]:
        """All parameters, those that an optimizer keeps apart too."""
        if self._own:
            return [p for optimizer in self._own for p in all_of(optimizer)]
        return parameter_list(self._parameters())

    def listed(self) -> Sequence[Tensor]:
        """The parameters that are clipped."""
        every, apart = self.every(), self._apart()
        return [p for p in every if id(p) not in apart] if apart else every

    @property
    def may_skip(self) -> bool:
        """Whether a step may have to be left out."""
        skips = self.skip_above is not None or self.nonfinite == "skip"
        return skips or bool(getattr(self.max_norm, "may_skip", False))

    def _call(self, segments: Segments) -> Call:
        max_norm = self._limits() if self.scope == "group" else self.max_norm
        self.name_the_monitor()
        nonfinite, skip_above = self.nonfinite, self.skip_above
        if nonfinite == "skip":  # of a step that is left out the gradients stay as they are
            nonfinite = "unclipped"
            if skip_above is None or skip_above == math.inf:
                skip_above = sys.float_info.max  # which all finite norms are below
        return Call(
            max_norm, self.norm_type, nonfinite, segments, self.process_group,
            skip_above=skip_above, backend=self.backend, monitor=self.monitor,
        )  # fmt: skip

    def _selected(self) -> tuple[Parameters, Segments]:
        """What is clipped, and the segment of each, as they are now."""
        apart = self._apart()
        if not apart and len(self._own) < 2:
            parameters = self._parameters()
            if self.scope == "global":
                return parameters, GLOBAL
            if self.scope == "parameter":
                count = len(parameter_list(parameters))
                return parameters, Segments(range(count), count)
        every = self.every()
        places = [i for i, p in enumerate(every) if id(p) not in apart]
        names = self._names()
        named = [names[i] if names else f"parameters[{i}]" for i in places]
        chosen = Named([every[i] for i in places], named)
        if self.scope == "global":
            return chosen, GLOBAL
        if self.scope == "parameter":
            return chosen, Segments(places, len(every))
        groups = self._groups()
        of = [number for number, group in enumerate(groups) for _ in group["params"]]
        return chosen, Segments([of[i] for i in places], len(groups))

    def _parameters(self) -> Parameters:
        return self._own[0] if len(self._own) == 1 else self.parameters  # type: ignore[return-value]

    def _apart(self) -> set[int]:
        """The ids of the parameters that a known optimizer keeps apart."""
        return {
            id(p) for known in (self._own, self._attached) for o in known for p in kept_apart(o)
        }

    def _groups(self) -> list[dict[str, Any]]:
        if not self._own:
            raise ValueError(
                'scope="group": expected an Optimizer, whose parameter groups are the scopes, got '
                f"{_kind(self.parameters)}; make it Clipper(optimizer, …)"
            )
        return [group for optimizer in self._own for group in optimizer.param_groups]

    def _names(self) -> list[str] | None:
        """Of every parameter, where they are known."""
        if not self._own:
            return parameter_names(self._parameters())
        groups = self._groups()
        if all("param_names" in group for group in groups):
            return [name for group in groups for name in group["param_names"]]
        return None

    def _segment_names(self) -> list[str] | None:
        """Of a group its key ``name``, else its place; of parameters their own."""
        if self.scope == "parameter":
            return self._names()
        groups = self._groups()
        return [str(group.get("name", f"param_groups[{i}]")) for i, group in enumerate(groups)]

    def _limits(self) -> Threshold:
        """The threshold of each group: its key ``max_norm``, else the Clipper's."""
        groups = self._groups()
        limits = []
        for number, group in enumerate(groups):
            if "max_norm" not in group:
                limits.append(self.max_norm)
                continue
            try:
                limits.append(checked_max_norm(group["max_norm"]))
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{number}]: {error}") from None
        if all(limit is self.max_norm for limit in limits):
            return self.max_norm
        for limit in limits:
            if is_policy(limit):
                raise ValueError(
                    "param_groups: a policy finds the threshold of every group; take the key "
                    "max_norm away, or give the groups Clippers of their own"
                )
        if any(isinstance(limit, Tensor) for limit in limits):
            device = next(limit.device for limit in limits if isinstance(limit, Tensor))
            kept = [torch.as_tensor(limit, dtype=torch.float64, device=device) for limit in limits]
            return torch.stack(kept)
        return torch.tensor(limits, dtype=torch.float64, device="cpu")

    def attach(self, optimizer: torch.optim.Optimizer, *, allow_sync: bool = False) -> Attachment:
        """Clip inside ``optimizer.step()`` from now on; returns a handle with ``remove()``.

        torch's fused optimizers take the coefficient as they read the gradients: clipping then
        costs one read of them. Where one coefficient does not serve all that the optimizer reads,
        and in all other optimizers, the clip is in place before the step. A closure is clipped
        after each of its evaluations. Under ``torch.amp.GradScaler`` nothing else is needed.

        It may be attached to several optimizers, ``torch.optim.Muon`` beside AdamW: the first that
        steps clips for all, and its verdict on the step is theirs too.

        A clip through fusedclip's functions, or torch's while patched, is noticed and not done
        twice; torch's own is not seen.

        With ``skip_above``, ``SkipSpikes`` or ``nonfinite="skip"`` a step that is left out changes
        neither a parameter nor the optimizer's state: on the device, without waiting, for fused
        optimizers; for others only with ``allow_sync=True``, which waits for the norm every time.

        Raises:
            ValueError: something is attached to it already, or it has none of the parameters, or
                steps cannot be left out without waiting.
        """
        attachment = Attachment(self, optimizer, allow_sync)
        self._attached.add(optimizer)
        return attachment

    def attach_to_backward(self) -> BackwardAttachment:
        """Clip each gradient by its own norm as it lands; returns a handle with ``remove()``.

        For ``scope="parameter"``, and for what uses gradients up in ``backward()``: an optimizer in
        the backward pass, offloading. Hooks that are registered after this one see the clipped
        gradient; under FSDP2 they run after its reduce-scatter. Micro-batches of a step, but the
        last, go into ``with handle.accumulating():``. ``last_norm`` and the monitor have the norms
        when ``backward()`` has ended. A policy decides for each parameter when it lands; ``AdaGC``
        clips by the parameter's own norm in its warm-up, too. Gradients of a scaled loss are not
        unscaled: their thresholds have to be those of scaled norms.

        Raises:
            ValueError: another scope, steps that may have to be left out, or
                ``DistributedDataParallel``, whose gradients are complete only after ``backward()``.
        """
        self._in_backward = BackwardAttachment(self, self.parameters)
        return self._in_backward

    def call_for_one(self, max_norm: Threshold) -> Call:
        """The Call for one parameter by itself, without the monitor."""
        return Call(
            max_norm, self.norm_type, self.nonfinite, GLOBAL, self.process_group,
            backend=self.backend,
        )  # fmt: skip

    def name_the_monitor(self) -> None:
        """Tell the monitor the names of parameters and scopes, where it has none."""
        monitor = self.monitor
        if monitor is None or self.scope == "global":
            return
        if monitor.segments is None:
            monitor.segments = self._segment_names()
        if monitor.names is None:
            monitor.names = self._names()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the memory of the policies and of the monitor."""
        return {
            "max_norm": self.max_norm.state_dict() if is_policy(self.max_norm) else None,
            "skip_above": self.skip_above.state_dict() if is_policy(self.skip_above) else None,
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of a Clipper with the same kind of threshold."""
        history = state["max_norm"]
        if is_policy(self.max_norm) != (history is not None):
            raise ValueError(
                "state: it is of a Clipper with "
                f"{'a fixed threshold' if history is None else 'a policy'}, and this one has "
                f"{'a policy' if history is None else 'a fixed threshold'}"
            )
        if is_policy(self.max_norm):
            self.max_norm.load_state_dict(history)
            if self._in_backward is not None:
                self._in_backward.forget()
        skips = state.get("skip_above")
        if is_policy(self.skip_above) and skips is not None:
            self.skip_above.load_state_dict(skips)
        seen = state.get("monitor")
        if self.monitor is not None and seen is not None:
            self.monitor.load_state_dict(seen)


def _monitor(monitor: "bool | Monitor", max_norm: Threshold) -> "Monitor | None":
    if isinstance(monitor, bool):
        if not monitor:
            return None
        from fusedclip.monitor import Monitor  # for those who want one

        # The thresholds of a policy come with each step.
        return Monitor(math.inf if is_policy(max_norm) else max_norm)
    if not hasattr(monitor, "finish"):
        raise TypeError(f"monitor: expected True or a Monitor, got {type(monitor).__name__}")
    return monitor


def _optimizers(
    parameters: Parameters | Sequence[torch.optim.Optimizer],
) -> list[torch.optim.Optimizer]:
    """The optimizers that were given instead of parameters."""
    if isinstance(parameters, torch.optim.Optimizer):
        return [parameters]
    if isinstance(parameters, (list, tuple)) and parameters:
        found = [each for each in parameters if isinstance(each, torch.optim.Optimizer)]
        if found and len(found) < len(parameters):
            raise TypeError("parameters: expected optimizers or tensors, got both in one list")
        return found
    return []


def _kind(parameters: object) -> str:
    return "a module" if isinstance(parameters, nn.Module) else type(parameters).__name__
