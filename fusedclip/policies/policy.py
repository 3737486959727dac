"""What policies share: memory with a row for each norm, and its place in a checkpoint."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.rule import Decision

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Policy(ABC):
    """What policies share: memory with a row for each norm, that follows them to their device.

    A parameter that is added has a row of its own that begins anew; so a policy belongs to one
    Clipper.
    """

    may_skip: ClassVar[bool] = False  # whether a decision may be to leave the step out

    _memory: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    @abstractmethod
    def decide(self, norms: Tensor, whole: Tensor | None = None) -> Decision:
        """What becomes of a step with these norms, which enter the memory.

        Args:
            norms: before clipping, 0-dim or ``[segments]``, fp32 or fp64.
            whole: the norm of all gradients, 0-dim; by default the 2-norm of ``norms``.
        """

    def threshold(self, norm: Tensor) -> Tensor:
        """The thresholds of ``decide``, for those that clip themselves.

        Args:
            norm: before clipping, 0-dim or ``[segments]``, fp32 or fp64.

        Returns:
            fp64 in the norms' shape and on their device; ``inf`` says not to clip.
        """
        limits = self.decide(norm).thresholds
        return torch.as_tensor(limits, dtype=torch.float64, device=norm.device).expand(norm.shape)

    def ahead(self, count: int, device: torch.device) -> float | Tensor | None:
        """The thresholds of the next step where its norms do not matter to them, fp64 ``[count]``.

        The clip is then one pass, after which ``remember`` is called. ``None``: ask ``decide``.
        """
        return None

    def remember(self, norms: Tensor, whole: Tensor | None) -> Tensor | None:
        """The norms of a step that was clipped at what ``ahead`` said enter the memory.

        Args:
            whole: as of ``decide``, where ``may_skip`` says that it is needed.

        Returns:
            Whether to leave the step out; ``None``: take it.
        """
        return self.decide(norms, whole).skip

    def state_dict(self) -> dict[str, Any]:
        """A copy of the memory. The configuration is the constructor's, not part of it."""
        return {name: self._memory[name].clone() for name in self._saved()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on, bit for bit, where ``state_dict()`` was taken, on whatever device comes next.

        Raises:
            ValueError: the state is another policy's, or its window has another length.
        """
        for name in self._saved():
            own, given = self._memory[name], state.get(name)
            if (
                not isinstance(given, Tensor)
                or given.dim() != own.dim()
                or given.shape[1:] != own.shape[1:]
            ):
                shape = str(("rows", *own.shape[1:])).replace("'", "")
                got = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
                raise ValueError(
                    f"state_dict[{name!r}]: expected a tensor of shape {shape}, got "
                    f"{got}; load it into a {type(self).__name__} made with the same arguments"
                )
        for name in self._saved():
            own, given = self._memory[name], state[name]
            if own.shape == given.shape:
                own.copy_(given)  # into the same memory: a captured graph has its address
            else:
                self._memory[name] = given.to(own.device, own.dtype, copy=True)

    def row(self, index: int, count: int, device: torch.device) -> "Self":
        """The policy of one norm of ``count``: its memory is that row of this one's."""
        self._ready_for(count, device)
        one = replace(self)
        one._memory.update({name: whole[index : index + 1] for name, whole in self._memory.items()})
        return one

    def _ready_for(self, count: int, device: torch.device) -> None:
        rows = len(next(iter(self._memory.values())))
        if count < rows:
            raise ValueError(
                f"{type(self).__name__}: expected {rows} norms as in the steps before, got "
                f"{count}; give each Clipper a policy of its own, and a new one where parameters "
                "were taken away"
            )
        if count > rows or next(iter(self._memory.values())).device != device:
            with torch.inference_mode(False):  # where tensors are made that never change again
                fresh = self._fresh(count - rows)
                for name, tensor in self._memory.items():
                    grown = torch.cat([tensor, fresh[name].to(tensor.device)])
                    self._memory[name] = grown.to(device)

    def _saved(self) -> tuple[str, ...]:
        return tuple(self._memory)

    @abstractmethod
    def _fresh(self, rows: int) -> dict[str, Tensor]:
        """The memory of ``rows`` norms of which nothing was seen, on the CPU."""


class BySegment(Policy):
    """A policy for which each norm has a row of its own."""

    def decide(self, norms: Tensor, whole: Tensor | None = None) -> Decision:
        checked(norms)
        with torch.no_grad():
            rows = norms.to(torch.float64).reshape(-1)
            self._ready_for(len(rows), norms.device)
            together = rows.norm() if whole is None else whole.to(torch.float64)
            return self._decide(rows, together, norms.dim() == 1)

    @abstractmethod
    def _decide(self, norms: Tensor, whole: Tensor, by_segment: bool) -> Decision:
        """``decide`` for fp64 norms ``[segments]``, where the memory is."""


class ThresholdPolicy(BySegment):
    """A policy that is a threshold for each norm."""

    def _decide(self, norms: Tensor, whole: Tensor, by_segment: bool) -> Decision:
        # A norm of 0 is that of no gradient where there are many; it says nothing of its segment.
        enters = norms.isfinite() & (norms > 0.0) if by_segment else norms.isfinite()
        limits = self._thresholds(norms, enters)
        return Decision(
            reference.coefficient(norms, limits), limits if by_segment else limits.reshape(())
        )

    @abstractmethod
    def _thresholds(self, norms: Tensor, enters: Tensor) -> Tensor:
        """fp64 ``[segments]``, for norms of which those that ``enters`` says are remembered."""


def checked(norms: Tensor) -> None:
    if norms.dim() > 1 or not norms.dtype.is_floating_point:
        raise ValueError(
            "norm: expected a 0-dim float tensor or a vector of them by segment, got shape "
            f"{tuple(norms.shape)}, {norms.dtype}"
        )
