"""A clip with its settings: called by hand, or attached to an optimizer."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedclip.attachment import Attachment
from fusedclip.backends import select
from fusedclip.call import Call
from fusedclip.checks import CHOICES, checked_max_norm, checked_nonfinite, checked_norm_type
from fusedclip.parameters import Parameters, parameter_list
from fusedclip.pipeline import Unscale
from fusedclip.rule import GLOBAL, Adaptive, Segments, Threshold

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from fusedclip.monitor import Monitor

SCOPES = ("global", "group", "parameter")
NONFINITE = (*CHOICES, "skip")


class Clipper:
    r"""Clips the gradients of one model, always in the same way.

    Args:
        model_or_parameters: as in ``clip_``. A module or an optimizer is asked anew at each call,
            so parameters may be frozen or added later.
        max_norm: a number >= 0, a 0-dim tensor, or a policy (``AutoClip``, ``ZClip``) that follows
            the norms.
        norm_type: p of the p-norm.
        nonfinite: as in ``clip_``; ``"skip"``, for an attached Clipper, leaves out the step.
        scope: ``"global"`` clips all gradients as one vector, ``"parameter"`` each by its own norm,
            ``"group"`` each parameter group of an optimizer, by the key ``max_norm`` of the group
            where it has one.
        monitor: keep the norms of every step and every parameter, in the same pass: ``True`` or a
            ``Monitor``, then ``clipper.monitor``. It watches the global norm.
        process_group: also add up over the ranks of this group.
        backend: as in ``clip_``.

    >>> clipper = fusedclip.Clipper(model, max_norm=1.0)
    >>> clipper.attach(optimizer)  # from now on optimizer.step() clips
    """

    def __init__(
        self,
        model_or_parameters: Parameters,
        max_norm: Threshold,
        *,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        scope: str = "global",
        monitor: "bool | Monitor" = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
        checked_nonfinite(nonfinite, NONFINITE)
        if isinstance(model_or_parameters, Iterator):  # it can be read only once
            model_or_parameters = list(model_or_parameters)
        limit = max_norm if _is_policy(max_norm) else checked_max_norm(max_norm)
        if scope != "global" and not isinstance(limit, float):
            raise ValueError(
                f"max_norm: expected a number with scope={scope!r}, got {type(limit).__name__}; "
                "tensors and policies are for the global norm"
            )
        if scope != "global" and monitor:
            raise ValueError(
                f"monitor: expected False with scope={scope!r}; a Monitor compares the global norm "
                "with one threshold (its update() can be fed by hand)"
            )
        self.parameters = model_or_parameters
        self.max_norm = limit
        self.norm_type = checked_norm_type(norm_type)
        self.nonfinite = nonfinite
        self.scope = scope
        self.process_group = process_group
        self.backend = backend
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
        if self.nonfinite == "skip":
            raise RuntimeError(
                'nonfinite="skip" leaves out a step of the optimizer, so it needs one: call '
                "attach(optimizer) instead of clip_()"
            )
        return self.clip_with_(self.nonfinite)

    def clip_with_(self, nonfinite: str) -> Tensor:
        """``clip_`` with another policy for a NaN or infinite norm."""
        self.last_norm = self._call(nonfinite).apply(self.parameters)
        return self.last_norm

    def decide(self, unscale: Unscale | None = None) -> tuple[Tensor, Tensor]:
        """The norm, and the coefficient (fp64 ``[1]``) that the caller applies.

        Args:
            unscale: the gradients are of a scaled loss.
        """
        nonfinite = "propagate" if self.nonfinite == "skip" else self.nonfinite
        self.last_norm, coefficient = self._call(nonfinite).decide(self.parameters, unscale)
        return self.last_norm, coefficient

    def _call(self, nonfinite: str) -> Call:
        max_norm, segments = self._thresholds()
        return Call(
            max_norm, self.norm_type, nonfinite, segments, self.process_group,
            backend=self.backend, monitor=self.monitor,
        )  # fmt: skip

    def _thresholds(self) -> tuple[Threshold, Segments]:
        """The threshold of each segment, and the segment of each parameter, as they are now."""
        if self.scope == "global":
            return self.max_norm, GLOBAL
        assert isinstance(self.max_norm, float)
        if self.scope == "parameter":
            count = len(parameter_list(self.parameters))
            limits, of = [self.max_norm] * count, range(count)
            return _fp64(limits), Segments(of, count)
        if not isinstance(self.parameters, torch.optim.Optimizer):
            raise ValueError(
                'scope="group": expected an Optimizer, whose parameter groups are the scopes, got '
                f"{_kind(self.parameters)}; make it Clipper(optimizer, …)"
            )
        segments: list[int] = []
        limits = []
        for number, group in enumerate(self.parameters.param_groups):
            segments += [number] * len(group["params"])
            try:
                limit = checked_max_norm(group.get("max_norm", self.max_norm))
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{number}]: {error}") from None
            limits.append(float(limit))
        return _fp64(limits), Segments(segments, len(limits))

    def attach(self, optimizer: torch.optim.Optimizer, *, allow_sync: bool = False) -> Attachment:
        """Clip inside ``optimizer.step()`` from now on; returns a handle with ``remove()``.

        torch's fused optimizers take the coefficient as they read the gradients: clipping then
        costs one read of them. Others, and all with ``scope`` or ``nonfinite="zero"``, clip in
        place before the step. A closure is clipped after each of its evaluations. Under
        ``torch.amp.GradScaler`` a fused optimizer needs nothing; others get unscaled gradients.

        A clip through fusedclip's functions, or torch's while patched, is noticed and not done
        twice; torch's own is not seen.

        With ``nonfinite="skip"`` a step with a NaN or infinite norm changes neither a parameter nor
        the optimizer's state: on the device, without waiting, for fused optimizers; for others
        only with ``allow_sync=True``, which waits for the norm at every step.

        Raises:
            ValueError: something is attached to it already, or it has none of the parameters, or
                ``nonfinite="skip"`` cannot be done without waiting.
        """
        return Attachment(self, optimizer, allow_sync)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the histories of the policy and of the monitor."""
        return {
            "max_norm": self.max_norm.state_dict() if _is_policy(self.max_norm) else None,
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of a Clipper with the same kind of threshold."""
        history = state["max_norm"]
        if _is_policy(self.max_norm) != (history is not None):
            raise ValueError(
                "state: it is of a Clipper with "
                f"{'a fixed threshold' if history is None else 'a policy'}, and this one has "
                f"{'a policy' if history is None else 'a fixed threshold'}"
            )
        if _is_policy(self.max_norm):
            self.max_norm.load_state_dict(history)
        seen = state.get("monitor")
        if self.monitor is not None and seen is not None:
            self.monitor.load_state_dict(seen)


def _fp64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _is_policy(max_norm: Threshold) -> "TypeIs[Adaptive]":
    return hasattr(max_norm, "threshold") and not isinstance(max_norm, Tensor)


def _monitor(monitor: "bool | Monitor", max_norm: Threshold) -> "Monitor | None":
    if isinstance(monitor, bool):
        if not monitor:
            return None
        from fusedclip.monitor import Monitor  # for those who want one

        # The thresholds of a policy come with each step.
        return Monitor(math.inf if _is_policy(max_norm) else max_norm)
    if not hasattr(monitor, "finish"):
        raise TypeError(f"monitor: expected True or a Monitor, got {type(monitor).__name__}")
    return monitor


def _kind(parameters: Parameters) -> str:
    return "a module" if isinstance(parameters, nn.Module) else type(parameters).__name__
