"""What fusedclip raises beyond ``ValueError`` and ``TypeError``.

RuntimeError
└── NonfiniteGradientError    the total norm is NaN or infinite and the caller asked for an error
"""

from collections.abc import Sequence
from dataclasses import dataclass

_NAMED_CULPRITS = 5  # enough to see a pattern, short enough for one log line


@dataclass(frozen=True)
class Culprit:
    """A gradient that holds NaN or inf: its place in ``parameters``, shape, name and rank."""

    index: int
    shape: tuple[int, ...]
    name: str | None = None
    rank: int | None = None  # where it is, when ranks clip together

    def __str__(self) -> str:
        name = "" if self.name is None else f" {self.name!r}"
        where = "" if self.rank is None else f"rank {self.rank}: "
        return f"{where}grads[{self.index}]{name} of shape {self.shape}"


class NonfiniteGradientError(RuntimeError):
    """The total norm is NaN or infinite; no gradient was changed.

    The message starts with torch's wording for ``error_if_nonfinite=True`` and goes on with the
    offending gradients. ``culprits`` lists all of them.
    """

    def __init__(self, norm_type: float, culprits: Sequence[Culprit] = ()) -> None:
        self.norm_type = norm_type
        self.culprits = tuple(culprits)
        super().__init__(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`. " + self._blame()
        )

    def _blame(self) -> str:
        if not self.culprits:
            return "Every gradient is finite: it is their norm that exceeds the range of its type."
        named = ", ".join(str(culprit) for culprit in self.culprits[:_NAMED_CULPRITS])
        more = len(self.culprits) - _NAMED_CULPRITS
        return f"Non-finite: {named}" + (f", and {more} more." if more > 0 else ".")

    def __reduce__(self) -> tuple[type, tuple[float, tuple[Culprit, ...]]]:
        return type(self), (self.norm_type, self.culprits)
