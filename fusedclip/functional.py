"""The functions that users call. ``clip_`` is the strict entry; the functions with torch's names
take torch's arguments and keep torch's edge cases. Each checks its arguments and makes a ``Call``.
"""

import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fusedclip import actions, ops
from fusedclip.ambient import native_allowed
from fusedclip.backends import reference, select
from fusedclip.call import Call
from fusedclip.checks import checked_max_norm, checked_nonfinite, checked_norm_type
from fusedclip.gradients import gather
from fusedclip.parameters import Parameters, parameter_list
from fusedclip.pipeline import tensor_powers


def clip_(
    parameters: Parameters,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    nonfinite: str = "propagate",
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    r"""Clip the gradients of ``parameters`` by their global norm, in place.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{\lVert g \rVert + 10^{-6}}\right)

    with :math:`g` all gradients as one vector. Below the threshold no gradient is written.

    Args:
        parameters: a Tensor, an iterable of Tensors, an ``nn.Module`` or an ``Optimizer``; their
            ``.grad`` of any shape in float32, float64, float16, bfloat16 or complex, in any mix of
            dtypes, devices and layouts (sparse COO for norms 1, 2 and inf). A gradient listed twice
            counts and scales once. Of DTensors the whole tensors count, whatever their meshes;
            every rank of a mesh must pass at least one parameter of it.
        max_norm: the threshold, >= 0, or a 0-dim tensor. ``inf`` measures and never writes.
        norm_type: p of the p-norm; any that ``torch.linalg.vector_norm`` takes, ``inf`` included.
        error_if_nonfinite: the same as ``nonfinite="error"``.
        nonfinite: what a NaN or infinite norm does: ``"propagate"`` multiplies by the coefficient
            as computed (torch's behaviour), ``"zero"`` sets every gradient to 0, ``"error"`` raises
            and leaves every gradient as it was (this waits for the device).
        process_group: also add up over the ranks of this group, each holding other gradients. A
            parameter whose ``fusedclip_counted`` is False is only scaled: another rank counts it.
        backend: ``"auto"``, or one of ``available_backends()`` by name.

    Returns:
        The norm before clipping: a 0-dim tensor on the first gradient's device, float32, or float64
        when any gradient is float64; ``tensor(0.)`` when there is no gradient.

    Raises:
        TypeError, ValueError: a bad argument or gradient; nothing was modified.
        NonfiniteGradientError: the norm is not finite and ``nonfinite="error"``.

    Source: ``torch.nn.utils.clip_grad_norm_``; Pascanu et al. 2013, arXiv 1211.5063.

    >>> loss.backward()
    >>> grad_norm = fusedclip.clip_(model, max_norm=1.0)
    >>> optimizer.step()
    """
    if is_dynamo_compiling():
        limit, order, policy = _checked(max_norm, norm_type, error_if_nonfinite, nonfinite)
        return ops.traced_clip(parameters, limit, order, policy, process_group, backend, True)
    make = _call if isinstance(max_norm, Tensor) or process_group is not None else _known_call
    call = make(max_norm, norm_type, error_if_nonfinite, nonfinite, process_group, backend)
    return call.apply(parameters)


def _checked(
    max_norm: float | Tensor, norm_type: float, error_if_nonfinite: bool, nonfinite: str
) -> tuple[float | Tensor, float, str]:
    limit, order = checked_max_norm(max_norm), checked_norm_type(norm_type)
    checked_nonfinite(nonfinite)
    if error_if_nonfinite and nonfinite == "zero":
        raise ValueError('error_if_nonfinite=True contradicts nonfinite="zero"; choose one')
    return limit, order, "error" if error_if_nonfinite else nonfinite


def _call(
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    nonfinite: str,
    process_group: Any,
    backend: str,
) -> Call:
    limit, order, policy = _checked(max_norm, norm_type, error_if_nonfinite, nonfinite)
    return Call(limit, order, policy, process_group=process_group, backend=backend)


# A training clips with the same arguments at every step: they are checked at the first. Typed, for
# True is 1.0 else.
_known_call = functools.lru_cache(maxsize=256, typed=True)(_call)


def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.utils.clip_grad_norm_``: its arguments, results and edge cases.

    Differences, all improvements: the norm is exact and never in a half type, finite gradients have
    a finite norm, gradients below the threshold are not written, a gradient listed twice counts
    once, and ``max_norm=inf`` never writes. ``foreach`` matters only where torch's operations do
    the work: in modes, transforms and traces, and for tensor subclasses.
    """
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    limit, order = float(max_norm), float(norm_type)
    nonfinite = "error" if error_if_nonfinite else "propagate"
    if is_dynamo_compiling():
        return ops.clip_as_torch(parameter_list(parameters), limit, order, nonfinite, foreach)
    return _torch_call(limit, order, nonfinite, foreach).apply(parameters)


@functools.lru_cache(maxsize=256)
def _torch_call(max_norm: float, order: float, nonfinite: str, foreach: bool | None) -> Call:
    return Call(max_norm, order, nonfinite, strict=False, foreach=foreach)


def get_total_norm(
    tensors: Tensor | Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.utils.get_total_norm``: the norm of ``tensors`` as one vector.

    One read, no write. The result is float32 (float64 when any tensor is), never a half type. A
    tensor listed twice counts twice, as in torch: nothing is written.
    """
    items, order = parameter_list(tensors), float(norm_type)
    nonfinite = "error" if error_if_nonfinite else "propagate"
    measure = ops.total_norm if is_dynamo_compiling() else actions.total_norm
    return measure(items, order, nonfinite, foreach)


def get_tensor_norms(tensors: Tensor | Any, norm_type: float = 2.0) -> Tensor:
    """The p-norm of each tensor, all in one pass.

    For a DTensor it is the norm of the whole tensor: one all-reduce of a vector for each process
    group, for which all ranks of a mesh must list its tensors in the same order.

    Returns:
        ``[len(tensors)]`` on the first tensor's device, float32 (float64 when any tensor is).

    >>> fusedclip.get_tensor_norms([p.grad for p in model.parameters()])
    """
    order = checked_norm_type(norm_type)
    items = parameter_list(tensors)
    backend = select.resolve("auto") if native_allowed() else select.Choice()
    grads = gather(
        items, backend, from_parameters=False, reads_only=True, norm_type=order, must_take_all=True
    )
    if grads.empty:
        return torch.zeros(0)
    with torch.no_grad():
        powers = tensor_powers(grads, order, len(items))
        return reference.norm_of_power_sum(powers, order).to(grads.norm_dtype)


def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Drop-in for ``torch.nn.utils.clip_grads_with_norm_``: scale by a norm that is known.

    ``g ← g · min(1, max_norm / (total_norm + 1e-6))``; when that factor is 1 nothing is written.
    """
    tensors, limit = parameter_list(parameters), float(max_norm)
    scale_ = ops.scale_ if is_dynamo_compiling() else actions.scale_
    scale_(tensors, limit, total_norm, foreach)


def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Drop-in for ``torch.nn.utils.clip_grad_value_``: clamp each element to ±clip_value.

    Element-wise clamping changes the gradient's direction; ``clip_`` keeps it. Dense CPU gradients
    are read once, and written only where an element changes. All others are torch's: on a GPU its
    own multi-tensor kernels are as good. Results are torch's, bit for bit, for all but the payload
    of NaN.
    """
    tensors, limit = parameter_list(parameters), float(clip_value)
    clamp_ = ops.clamp_ if is_dynamo_compiling() else actions.clamp_
    clamp_(tensors, limit, foreach)
