"""The clip as an operator of torch's dispatcher, so that ``torch.compile`` keeps one graph.

``torch.ops.fusedclip.clip_`` is opaque to the compiler: it sees a list of gradients that is written
and a scalar that comes back. Registered through ``torch.library.Library``, which costs a fraction
of ``torch.library.custom_op`` at import.
"""

# mypy: disable-error-code="no-untyped-call"
# torch.library.Library has no annotations.

from typing import Any

import torch
from torch import Tensor

from fusedclip.call import Call
from fusedclip.parameters import Parameters, parameter_list
from fusedclip.sharded.placements import is_sharded

_library = torch.library.Library("fusedclip", "DEF")
_library.define(
    "clip_(Tensor(a!)[] grads, Tensor max_norm, float norm_type, str nonfinite, str backend)"
    " -> Tensor"
)


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
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    if not isinstance(max_norm, Tensor):
        max_norm = torch.tensor(max_norm, dtype=torch.float64, device="cpu")
    norm: Tensor = torch.ops.fusedclip.clip_(grads, max_norm, order, nonfinite, backend)
    return norm


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


def _clip(
    grads: list[Tensor], max_norm: Tensor, norm_type: float, nonfinite: str, backend: str
) -> Tensor:
    limit = max_norm.item() if max_norm.device.type == "cpu" else max_norm
    call = Call(limit, norm_type, nonfinite, backend=backend, from_parameters=False)
    return call.apply(grads)


def _shape_of_clip(
    grads: list[Tensor], max_norm: Tensor, norm_type: float, nonfinite: str, backend: str
) -> Tensor:
    wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    return grads[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


_library.impl("clip_", _clip, "CompositeExplicitAutograd")
_library.impl("clip_", _shape_of_clip, "Meta")
