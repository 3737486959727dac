"""The one doorway: every way of clipping makes a ``Call`` and applies it.

A call gathers the gradients, hands them to the pipeline, keeps the record that monitors ask for and
announces the clip to those that listen, once.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fusedclip import dispatched
from fusedclip.ambient import check_writable, native_allowed
from fusedclip.backends import plain, select
from fusedclip.gradients import Gradients, LeftToTorch, gather
from fusedclip.parameters import (
    Parameters,
    check_types,
    gradients_of,
    parameter_list,
    parameter_names,
)
from fusedclip.pipeline import Outcome, Record, Unscale, run
from fusedclip.rule import GLOBAL, Rule
from fusedclip.sharded.placements import are_of_one_mesh, as_dtensor, is_sharded

if TYPE_CHECKING:
    from fusedclip.monitor import Monitor


@dataclass(eq=False, repr=False)
class Clipped:
    """A clip that somebody asked for."""

    tensors: Sequence[Tensor]  # as the user listed them
    norm: Tensor | None  # before clipping; None where there is no norm of all
    threshold: float | Tensor  # what it was compared with
    from_parameters: bool = True  # False: the tensors are gradients themselves
    skip: Tensor | None = None  # bool, 0-dim: the step is to be left out

    def gradients(self) -> list[Tensor]:
        return gradients_of(self.tensors, self.from_parameters)


class Listener(Protocol):
    """Is told of every clip, after it."""

    def heard(self, clipped: Clipped) -> None: ...


class Listeners:
    """A set that keeps none of them alive."""

    def __init__(self) -> None:
        self.present: set[weakref.ref[Listener]] = set()

    def add(self, listener: Listener) -> None:
        self.present.add(weakref.ref(listener, self.present.discard))

    def discard(self, listener: Listener) -> None:
        self.present.discard(weakref.ref(listener))

    def __len__(self) -> int:
        return len(self.present)

    def __iter__(self) -> Iterator[Listener]:
        alive = [listener() for listener in self.present]
        return iter([listener for listener in alive if listener is not None])


# What listens: an attached Clipper, for example. Their owners keep them alive.
listeners = Listeners()
# Asked before each clip for a Monitor of these tensors; ``fusedclip run --monitor`` is one.
observers: "list[Callable[[Sequence[Tensor]], Monitor | None]]" = []


def announce(clipped: Clipped) -> None:
    """Tell the listeners of a clip."""
    for listener in listeners:
        listener.heard(clipped)


def monitors_of(tensors: Sequence[Tensor], own: "Monitor | None" = None) -> "list[Monitor]":
    """The monitors that want the record of a clip: its own, and the newest observer's."""
    monitors = [] if own is None else [own]
    for observer in reversed(observers):
        monitor = observer(tensors)
        if monitor is not None and monitor is not own:
            return [*monitors, monitor]
    return monitors


@dataclass(frozen=True, eq=False, repr=False)
class Call(Rule):
    """How to clip, and where."""

    backend: str = "auto"
    monitor: "Monitor | None" = None
    from_parameters: bool = True  # False: the tensors are gradients themselves
    # Of each parameter, where plain gradients are shards: the DeviceMesh they are shards over, or
    # None for a whole one.
    meshes: Sequence[Any] | None = None
    foreach: bool | None = None  # as of torch's functions, where its operations do the work

    def apply(
        self,
        parameters: Parameters,
        unscale: Unscale | None = None,
    ) -> Tensor:
        """Clip in place.

        Args:
            parameters: as of ``clip_``.
            unscale: unscale in the same pass.

        Returns:
            The norms before clipping: 0-dim, or ``[num_segments]``.
        """
        tensors = parameters if type(parameters) is list else parameter_list(parameters)
        if unscale is None and not observers and not is_dynamo_compiling():
            norm = self.plainly(tensors)
            if norm is not None:
                if listeners.present:
                    assert isinstance(self.max_norm, float)
                    announce(Clipped(tensors, norm, self.max_norm, self.from_parameters))
                return norm
        return self._otherwise(parameters, tensors, unscale, native_allowed())

    def plainly(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Clip by one native call and tell nobody; ``None`` as of ``plain.clip_``."""
        clip = self._plain
        return None if clip is None else plain.clip_(clip, tensors)

    def _otherwise(
        self, parameters: Parameters, tensors: Sequence[Tensor], unscale: Unscale | None, may: bool
    ) -> Tensor:
        """By the pipeline, or, where torch has to see every operation, by torch's."""
        if unscale is not None or not self._dispatchable:
            return self._run(parameters, tensors, unscale, may, write=True).norms
        if not may and not self._are_for_torch(gradients_of(tensors, self.from_parameters)):
            return self._run(parameters, tensors, None, may, write=True).norms
        if may:
            with contextlib.suppress(LeftToTorch):
                return self._run(parameters, tensors, None, may, write=True).norms
        return self._dispatched(tensors)

    def carry_out(
        self, parameters: Parameters, unscale: Unscale | None = None, *, write: bool = True
    ) -> Outcome:
        """``apply``, and all that it comes to: also whether to leave the step out.

        Args:
            write: False leaves the gradients to the caller, who applies the coefficients.
        """
        limit = self.max_norm
        if write and self.skip_above is None and isinstance(limit, (float, Tensor)):
            return Outcome(self.apply(parameters, unscale), limit)
        tensors = parameter_list(parameters)
        return self._run(parameters, tensors, unscale, native_allowed(), write=write)

    @functools.cached_property
    def _plain(self) -> plain.PlainClip | None:
        """The native function that does all of it, if the gradients are plain as well."""
        can = (
            not plain.problem(self.backend)
            and (self.norm_type == 2.0 or (self.infinity and self.strict))
            and self.segments is GLOBAL
            and self.process_group is None
            and self.meshes is None
            and self.monitor is None
            and self.skip_above is None
        )
        if not can or not isinstance(self.max_norm, float):
            return None
        return plain.prepared(
            self.max_norm,
            from_parameters=self.from_parameters,
            infinity=self.infinity,
            nonfinite=self.nonfinite,
            backend=self.backend,
        )

    @property
    def _dispatchable(self) -> bool:
        """Whether ``dispatched`` can do all of it."""
        return (
            self.monitor is None
            and self.segments is GLOBAL
            and self.process_group is None
            and self.meshes is None
            and self.skip_above is None
            and isinstance(self.max_norm, (float, Tensor))
        )

    def _are_for_torch(self, grads: Sequence[Tensor]) -> bool:
        """Whether torch's operations can, and may, reduce the norm of DTensors.

        They communicate more than the pipeline does, so ``clip_`` does without them.
        """
        if self.strict:
            return not any(is_sharded(grad) for grad in grads)
        return are_of_one_mesh(grads)

    def _dispatched(self, tensors: Sequence[Tensor]) -> Tensor:
        """By torch's operations; monitors see nothing of it, since it may be a trace."""
        assert isinstance(self.max_norm, (float, Tensor))
        if self.strict:
            check_types(tensors)
        grads = gradients_of(tensors, self.from_parameters)
        if self.strict and self.infinity:
            grads = [grad for grad in grads if grad.numel()]
        norm = dispatched.clip_(grads, self.max_norm, self.norm_type, self.nonfinite, self.foreach)
        if not is_dynamo_compiling() and listeners.present:
            announce(Clipped(tensors, norm, self.max_norm, self.from_parameters))
        return norm

    def _run(
        self,
        parameters: Parameters,
        tensors: Sequence[Tensor],
        unscale: Unscale | None,
        native_may: bool,
        *,
        write: bool,
    ) -> Outcome:
        choice = select.resolve(self.backend) if native_may else select.Choice()
        grads = self._gather(tensors, choice)
        if write:
            check_writable(tensors, self.from_parameters)
        if unscale is not None:
            unscale.prepare(tensors, grads, self.process_group)
        with self._recording(parameters, tensors, grads.device) as record:
            outcome = run(parameters, grads, self, unscale, record, write=write)
        if listeners.present:
            announce(
                Clipped(
                    tensors,
                    outcome.norms,
                    outcome.threshold,
                    self.from_parameters,
                    outcome.skip,
                )
            )
        if not self.strict and grads.shards is not None:
            return replace(outcome, norms=as_dtensor(outcome.norms, grads.shards))
        return outcome

    def _gather(self, tensors: Sequence[Tensor], choice: select.Choice) -> Gradients:
        """Raises TypeError or ValueError, as of ``clip_``."""
        uncounted: frozenset[int] = frozenset()
        if self.process_group is not None:
            from fusedclip.sharded import reduce

            reduce.check_process_group(self.process_group)
            uncounted = frozenset(
                i
                for i, tensor in enumerate(tensors)
                if not getattr(tensor, "fusedclip_counted", True)
            )
        return gather(
            tensors,
            choice,
            from_parameters=self.from_parameters,
            strict=self.strict,
            norm_type=self.norm_type,
            uncounted=uncounted,
            meshes=self.meshes,
            must_take_all=not self._dispatchable,
        )

    @contextlib.contextmanager
    def _recording(
        self, parameters: Parameters, tensors: Sequence[Tensor], device: torch.device
    ) -> Iterator[Record | None]:
        """The record that the clip is to fill in, which then goes to all monitors."""
        monitors = monitors_of(tensors, self.monitor)
        if not monitors:
            yield None
            return
        own = self.monitor
        if own is not None and (own.names is None or len(own.names) != len(tensors)):
            own.names = parameter_names(parameters)
        with monitors[0].recording(len(tensors), device) as record:
            try:
                yield record
            finally:
                for monitor in monitors[1:]:
                    monitor.finish(replace(record, tensor_norms=record.tensor_norms.clone()))
