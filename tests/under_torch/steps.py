"""What is compared: the torch-named functions as functions of gradients, and what comes of them.

A ``Step`` is called with gradients and returns the norm, where there is one, and the gradients as
they are afterwards. It looks the functions up in ``torch.nn.utils`` when it runs, as a user's code
does, so the same step is torch's own without ``fusedclip.patch()`` and fusedclip's with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

# torch's own, whatever is patched, as a module has them that imported them by name.
TORCHS = {
    "clip_grad_norm_": clip_grad.clip_grad_norm_,
    "get_total_norm": clip_grad._get_total_norm,
    "clip_grads_with_norm_": clip_grad._clip_grads_with_norm_,
    "clip_grad_value_": clip_grad.clip_grad_value_,
}
IN_A_ROW = "get_total_norm, clip_grads_with_norm_"
FUNCTIONS = (*TORCHS, IN_A_ROW)

MAX_NORM = 1.0
CLIP_VALUE = 0.5
# The gradients' norm is 13 and their largest element 12 times these.
MAGNITUDES = {"clipped": 1.0, "not clipped": 2.0**-7}  # exact in half types


@dataclass(frozen=True)
class Step:
    """One of ``FUNCTIONS``, or two in a row.

    Args:
        foreach: as the functions take it; torch's refuse some gradients unless it is False.
        readable: gradient → what torch can take the norm of, for the norm that is given to
            ``clip_grads_with_norm_``.
        early: the functions are those that were imported by name before any ``patch()``.
        holder: gradient → what holds it in ``.grad``.
    """

    function: str
    norm_type: float = 2.0
    foreach: bool | None = None
    early: bool = False
    holder: Callable[[Tensor], Any] | None = None
    readable: Callable[[Tensor], Tensor] | None = None

    def __call__(self, *grads: Tensor) -> tuple[Any, ...]:
        return self.on_parameters(*[self.hold(grad) for grad in grads])

    def hold(self, grad: Tensor) -> Any:
        return held(grad) if self.holder is None else self.holder(grad)

    def on_parameters(self, *parameters: Any) -> tuple[Any, ...]:
        norm = self.run(parameters)
        after = tuple(p.grad for p in parameters)
        return after if norm is None else (norm, *after)

    def run(self, parameters: Sequence[Any]) -> Tensor | None:
        grads = [p.grad for p in parameters]
        order, foreach = self.norm_type, self.foreach
        if self.function == "clip_grad_norm_":
            clip = TORCHS["clip_grad_norm_"] if self.early else torch.nn.utils.clip_grad_norm_
            return clip(parameters, MAX_NORM, order, foreach=foreach)
        if self.function == "clip_grad_value_":
            clamp = TORCHS["clip_grad_value_"] if self.early else torch.nn.utils.clip_grad_value_
            return clamp(parameters, CLIP_VALUE, foreach)
        if self.function == "clip_grads_with_norm_" and self.readable is not None:
            grads = [self.readable(grad) for grad in grads]
        if self.function == "clip_grads_with_norm_" or self.early:
            total_norm = TORCHS["get_total_norm"]
        else:
            total_norm = torch.nn.utils.get_total_norm
        norm = total_norm(grads, order, foreach=foreach)
        if self.function == "get_total_norm":
            return norm
        if self.early:
            scale = TORCHS["clip_grads_with_norm_"]
        else:
            scale = torch.nn.utils.clip_grads_with_norm_
        nothing = scale(parameters, MAX_NORM, norm, foreach)
        return norm if self.function == IN_A_ROW else nothing


@dataclass(frozen=True)
class Meant:
    """A step with another function of the gradients: what fusedclip promises in its place."""

    step: Step
    function: Callable[..., Sequence[Any]]

    def __call__(self, *grads: Tensor) -> Sequence[Any]:
        return self.function(*grads)

    def hold(self, grad: Tensor) -> Any:
        return self.step.hold(grad)

    def on_parameters(self, *parameters: Any) -> Sequence[Any]:
        return self.function(*[p.grad for p in parameters])


def held(grad: Tensor) -> Tensor:
    """A tensor with this gradient."""
    p = torch.zeros_like(grad)
    p.grad = grad
    return p


@dataclass(frozen=True)
class Raised:
    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {str(self.error).strip().partition(chr(10))[0]}"


def outcome(call: Callable[[], Sequence[Any]]) -> "list[Any] | Raised":
    """What a user is given, in plain values that stay comparable when the context has ended."""
    try:
        return [_seen(result) for result in call()]
    except Exception as error:
        return Raised(error)


def difference(ours: "list[Any] | Raised", torchs: "list[Any] | Raised") -> str:
    """What distinguishes two outcomes, in words; empty when nothing does."""
    if isinstance(torchs, Raised) or isinstance(ours, Raised):
        same_error = (
            isinstance(torchs, Raised)
            and isinstance(ours, Raised)
            and isinstance(ours.error, type(torchs.error))
        )
        return "" if same_error else f"fusedclip: {ours}; torch: {torchs}"
    if len(ours) != len(torchs):
        return f"fusedclip gives {len(ours)} results, torch {len(torchs)}"
    for place, (mine, theirs) in enumerate(zip(ours, torchs, strict=True)):
        problem = _difference_of_one(mine, theirs)
        if problem:
            return f"result {place}: {problem}"
    return ""


class Graphs(int):
    """How many graphs a compiler made: torch's own code may need another one, depending on what
    the process has compiled before; fusedclip must not need more."""


def _difference_of_one(mine: Any, theirs: Any) -> str:
    if isinstance(mine, Graphs) and isinstance(theirs, Graphs):
        return "" if mine <= theirs else f"fusedclip {mine} graphs, torch {theirs}"
    if not (isinstance(mine, _Seen) and isinstance(theirs, _Seen)):
        return "" if mine == theirs else f"fusedclip {mine!r}, torch {theirs!r}"
    if not issubclass(mine.type, theirs.type):
        return f"fusedclip's is a {mine.type.__name__}, torch's a {theirs.type.__name__}"
    for fact, theirs_is in theirs.facts.items():
        if mine.facts.get(fact) != theirs_is:
            return f"{fact}: fusedclip {mine.facts.get(fact)}, torch {theirs_is}"
    # The same product, rounded once, may be at either side of a half type's rounding.
    half = mine.facts["dtype"] in (torch.bfloat16, torch.float16)
    rtol = torch.finfo(mine.facts["dtype"]).eps if half else 1e-6
    try:
        torch.testing.assert_close(mine.values, theirs.values, rtol=rtol, atol=0, equal_nan=True)
    except AssertionError as error:
        return f"fusedclip {mine.values}, torch {theirs.values}: {error}"
    return ""


@dataclass(frozen=True)
class _Seen:
    """A tensor: its type, what can be asked of it, and the values of all its components."""

    type: type
    facts: dict[str, Any]
    values: list[Tensor]


def _seen(result: Any) -> Any:
    if not isinstance(result, Tensor):
        return result
    facts = {
        "dtype": result.dtype,
        "device": result.device,
        # A symbolic size is equal to itself alone.
        "shape": [size if isinstance(size, int) else "symbolic" for size in result.shape],
        "layout": result.layout,
        "requires_grad": result.requires_grad,
        "inference": result.is_inference(),
    }
    if isinstance(result, DTensor):
        facts["mesh"] = tuple(result.device_mesh.shape)
    with torch.no_grad():
        return _Seen(type(result), facts, [value.clone() for value in _values(result)])


def _values(tensor: Tensor) -> Iterator[Tensor]:
    """Plain tensors with all values; none of a tensor that has no values."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type == "meta":
        return
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _values(getattr(tensor, name))
    elif hasattr(tensor, "elem"):
        yield from _values(tensor.elem)
    elif tensor.is_nested:
        yield from tensor.unbind()
    elif tensor.layout != torch.strided:
        yield tensor.to_dense()
    else:
        yield tensor.detach().as_subclass(Tensor)
