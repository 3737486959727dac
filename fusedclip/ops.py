"""The functions as operators of torch's dispatcher, so that ``torch.compile`` keeps one graph.

``torch.ops.fusedclip`` has ``clip_``, ``total_norm``, ``scale_`` and ``clamp_``. They are opaque to
the compiler: it sees lists of gradients that are read or written, and a norm that comes back as a
tensor. Tensor subclasses and DTensors go into the graph as torch's own operations (``dispatched``).
Registered through ``torch.library.Library``, which costs a fraction of ``torch.library.custom_op``
at import.
"""

# mypy: disable-error-code="no-untyped-call"
# torch.library.Library has no annotations.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedclip import actions, dispatched
from fusedclip.backends.reference import DTYPES
from fusedclip.call import Call
from fusedclip.parameters import Parameters, gradients_of, parameter_list
from fusedclip.sharded.placements import is_sharded

_library = torch.library.Library("fusedclip", "DEF")


def traced_clip(
    parameters: Parameters,
    max_norm: float | Tensor,
    order: float,
    nonfinite: str,
    process_group: Any,
    backend: str,
    strict: bool,
) -> Tensor:
    """A clip while ``torch.compile`` traces: the operator; arguments as of ``Call``.

    With collectives it is a graph break, since the compiler does not trace those.
    """
    tensors = parameter_list(parameters)
    if process_group is not None or any(is_sharded(tensor) for tensor in tensors):
        return _outside_the_graph(
            parameters, max_norm, order, nonfinite, process_group, backend, strict
        )
    grads = gradients_of(tensors, True)
    if not grads:
        return _no_norm()
    if not _are_plain(grads):
        return dispatched.clip_(grads, max_norm, order, nonfinite)
    if not isinstance(max_norm, Tensor):
        max_norm = torch.tensor(max_norm, dtype=torch.float64, device="cpu")
    norm: Tensor = torch.ops.fusedclip.clip_(grads, max_norm, order, nonfinite, backend)
    return norm


def clip_as_torch(
    tensors: Sequence[Tensor],
    max_norm: float,
    order: float,
    nonfinite: str,
    foreach: bool | None,
) -> Tensor:
    """``clip_grad_norm_`` while ``torch.compile`` traces."""
    sharded = [is_sharded(tensor) for tensor in tensors]
    if any(sharded) and all(sharded):
        return dispatched.clip_(gradients_of(tensors, True), max_norm, order, nonfinite, foreach)
    return traced_clip(tensors, max_norm, order, nonfinite, None, "auto", False)


def total_norm(
    tensors: Sequence[Tensor], order: float, nonfinite: str, foreach: bool | None
) -> Tensor:
    """``get_total_norm`` while ``torch.compile`` traces."""
    if not tensors or not _are_plain(tensors):
        return dispatched.total_norm(tensors, order, nonfinite, foreach)
    norm: Tensor = torch.ops.fusedclip.total_norm(tensors, order, nonfinite)
    return norm


def scale_(tensors: Sequence[Tensor], max_norm: float, norm: Tensor, foreach: bool | None) -> None:
    """``clip_grads_with_norm_`` while ``torch.compile`` traces."""
    grads = gradients_of(tensors, True)
    if grads and _are_plain([*grads, norm]):
        torch.ops.fusedclip.scale_(grads, max_norm, norm)
    else:
        dispatched.scale_(grads, max_norm, norm, foreach)


def clamp_(tensors: Sequence[Tensor], limit: float, foreach: bool | None) -> None:
    """``clip_grad_value_`` while ``torch.compile`` traces."""
    grads = gradients_of(tensors, True)
    if grads and _are_plain(grads):
        torch.ops.fusedclip.clamp_(grads, limit)
    else:
        dispatched.clamp_(grads, limit, foreach)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the operators take them: what is asked here the compiler knows without a guard."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype in DTYPES
        for tensor in tensors
    )


def _no_norm() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float32, device="cpu")


def _outside_the_graph(*arguments: Any) -> Tensor:
    norm: Tensor = torch.compiler.disable(_apply)(*arguments)
    return norm


# The mark that torch.compiler.disable() sets; calling that here would import the compiler.
_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _apply(
    parameters: Parameters,
    max_norm: float | Tensor,
    order: float,
    nonfinite: str,
    process_group: Any,
    backend: str,
    strict: bool,
) -> Tensor:
    call = Call(
        max_norm, order, nonfinite, process_group=process_group, backend=backend, strict=strict
    )
    return call.apply(parameters)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, fake, "Meta")


def _clip(
    grads: list[Tensor], max_norm: Tensor, norm_type: float, nonfinite: str, backend: str
) -> Tensor:
    limit = max_norm.item() if max_norm.device.type == "cpu" else max_norm
    call = Call(limit, norm_type, nonfinite, backend=backend, from_parameters=False)
    return call.apply(grads)


def _shape_of_norm(tensors: list[Tensor], *_: Any) -> Tensor:
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


def _scale(grads: list[Tensor], max_norm: float, norm: Tensor) -> None:
    actions.scale_(grads, max_norm, norm, from_parameters=False)


def _clamp(grads: list[Tensor], limit: float) -> None:
    actions.clamp_(grads, limit, from_parameters=False)


def _nothing(*_: Any) -> None:
    """Of an operator that returns nothing."""


_define(
    "clip_(Tensor(a!)[] grads, Tensor max_norm, float norm_type, str nonfinite, str backend)"
    " -> Tensor",
    _clip,
    _shape_of_norm,
)
_define(
    "total_norm(Tensor[] tensors, float norm_type, str nonfinite) -> Tensor",
    actions.total_norm,
    _shape_of_norm,
)
_define("scale_(Tensor(a!)[] grads, float max_norm, Tensor norm) -> ()", _scale, _nothing)
_define("clamp_(Tensor(a!)[] grads, float limit) -> ()", _clamp, _nothing)
