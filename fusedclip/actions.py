"""What the functions beside the clip do with plain tensors: measure, scale, clamp.

``functional`` calls these, and so do the operators of compiled graphs. Each turns to ``dispatched``
where native code may not work.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedclip import dispatched
from fusedclip.ambient import check_writable, native_allowed
from fusedclip.backends import cpu, reference, select
from fusedclip.call import Call, Clipped, announce, listeners, monitors_of, observers
from fusedclip.gradients import LeftToTorch, dense_cpu, gather
from fusedclip.parameters import gradients_of
from fusedclip.pipeline import Record, run
from fusedclip.pipeline import scale_ as scale_gradients_
from fusedclip.sharded.placements import are_of_one_mesh, as_dtensor, dtensor_type

_LARGEST_HALF = torch.finfo(torch.float16).max


def total_norm(
    tensors: Sequence[Tensor], order: float, nonfinite: str, foreach: bool | None = None
) -> Tensor:
    """The norm of ``tensors``, each counted as often as it is listed. Nothing is written or told.

    Of DTensors of one mesh it is a DTensor, as torch's is.
    """
    norm = _measuring(order, nonfinite).plainly(tensors)
    if norm is not None:
        return norm
    native = native_allowed()
    if native or not are_of_one_mesh(tensors):
        try:
            grads = gather(
                tensors, _choice(native), from_parameters=False, reads_only=True,
                strict=False, norm_type=order,
            )  # fmt: skip
        except LeftToTorch:
            pass
        else:
            norm = run(tensors, grads, _measuring(order, nonfinite)).norms
            return norm if grads.shards is None else as_dtensor(norm, grads.shards)
    return dispatched.total_norm(tensors, order, nonfinite, foreach)


@functools.lru_cache(maxsize=32)
def _measuring(order: float, nonfinite: str) -> Call:
    """A clip that never bites: one measure and no write."""
    return Call(math.inf, order, nonfinite, strict=False, from_parameters=False)


def scale_(
    tensors: Sequence[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
    *,
    from_parameters: bool = True,
) -> None:
    """Scale the gradients by a norm that is known, and tell monitors and listeners."""
    # as_tensor() would move a tensor to the default device.
    norm = total_norm if isinstance(total_norm, Tensor) else torch.tensor(total_norm, device="cpu")
    native = native_allowed()
    grads = None
    if native or not are_of_one_mesh(gradients_of(tensors, from_parameters)):
        try:
            grads = gather(tensors, _choice(native), from_parameters=from_parameters, strict=False)
        except LeftToTorch:
            pass
        else:
            check_writable(tensors, from_parameters)
    if grads is None:
        dispatched.scale_(gradients_of(tensors, from_parameters), max_norm, norm, foreach)
    elif not grads.empty:
        with torch.no_grad():
            if isinstance(norm, dtensor_type() or ()):
                norm = norm.full_tensor()  # torch's norm of DTensors may be a pending sum
            scale_gradients_(grads, reference.coefficient(norm.reshape(1), max_norm))
        if observers:
            for monitor in monitors_of(tensors):
                none = torch.empty(0, dtype=torch.float64, device="cpu")
                monitor.finish(Record(none, norm, max_norm))
    if listeners.present and not torch.compiler.is_dynamo_compiling():
        announce(Clipped(tensors, norm, max_norm, from_parameters))


def clamp_(
    tensors: Sequence[Tensor],
    limit: float,
    foreach: bool | None = None,
    *,
    from_parameters: bool = True,
) -> None:
    """Each element to [-limit, limit]; dense CPU gradients natively, all others by torch."""
    dense = None
    # Larger ones, inf and NaN are torch's to judge: not every type can hold them.
    if abs(limit) <= _LARGEST_HALF and native_allowed():
        dense, tensors = dense_cpu(tensors, select.resolve("auto"), from_parameters)
    if tensors:  # first: it may raise
        dispatched.clamp_(gradients_of(tensors, from_parameters), limit, foreach)
    if dense is not None:
        cpu.clamp_(dense, limit)


def _choice(native: bool) -> select.Choice:
    return select.resolve("auto") if native else select.Choice()
