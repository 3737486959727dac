"""The pipeline: gather → measure → reduce → decide → scale, readable top to bottom.

``clip_`` is the strict entry; the functions with torch's names take torch's arguments and keep
torch's edge cases. In a single process whose gradients are all dense and on the CPU, everything
after ``gather`` is one native call.
"""

import math
import numbers
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_value_ as _torch_clip_grad_value_

from fusedclip.backends import cpu, cuda, reference, select, triton
from fusedclip.errors import Culprit, NonfiniteGradientError
from fusedclip.gradients import Gradients, Parameters, gather, parameter_list, parameter_name
from fusedclip.sharding import LOCAL, dtensor_type, is_sharded

if TYPE_CHECKING:
    # Imported where gradients are reduced, so that a single process does not wait for it.
    from fusedclip import distributed

_POLICIES = ("propagate", "zero", "error")


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
    limit = _checked_max_norm(max_norm)
    order = _checked_norm_type(norm_type)
    if nonfinite not in _POLICIES:
        raise ValueError(f"nonfinite: expected one of {_POLICIES}, got {nonfinite!r}")
    if error_if_nonfinite:
        if nonfinite == "zero":
            raise ValueError('error_if_nonfinite=True contradicts nonfinite="zero"; choose one')
        nonfinite = "error"
    return _clip(parameters, limit, order, nonfinite, process_group, backend, strict=True)


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
    once, and ``max_norm=inf`` never writes. ``foreach`` is accepted and has no effect.
    """
    del foreach
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    order = float(norm_type)
    nonfinite = "error" if error_if_nonfinite else "propagate"
    return _clip(parameters, float(max_norm), order, nonfinite, None, "auto", strict=False)


def get_total_norm(
    tensors: Tensor | Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.utils.get_total_norm``: the norm of ``tensors`` as one vector.

    One read, no write. The result is float32 (float64 when any tensor is), never a half type. A
    tensor listed twice counts once.
    """
    del foreach
    order = float(norm_type)
    backend = select.resolve("auto")
    grads = gather(
        parameter_list(tensors), backend, from_parameters=False, strict=False, norm_type=order
    )
    nonfinite = "error" if error_if_nonfinite else "propagate"
    # A clip that never bites: one measure, no write.
    return clip_gathered(tensors, grads, math.inf, order, nonfinite, None, strict=False)


def get_tensor_norms(tensors: Tensor | Any, norm_type: float = 2.0) -> Tensor:
    """The p-norm of each tensor, all in one pass.

    For a DTensor it is the norm of the whole tensor: one all-reduce of a vector for each process
    group, for which all ranks of a mesh must list its tensors in the same order.

    Returns:
        ``[len(tensors)]`` on the first tensor's device, float32 (float64 when any tensor is).

    >>> fusedclip.get_tensor_norms([p.grad for p in model.parameters()])
    """
    order = _checked_norm_type(norm_type)
    items = parameter_list(tensors)
    backend = select.resolve("auto")
    grads = gather(items, backend, from_parameters=False, deduplicate=False, norm_type=order)
    if grads.empty:
        return torch.zeros(0)
    with torch.no_grad():
        powers = _tensor_powers(grads, order, len(items))
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
    del foreach
    limit = float(max_norm)
    grads = gather(parameter_list(parameters), select.resolve("auto"), strict=False)
    with torch.no_grad():
        norm = torch.as_tensor(total_norm)
        if isinstance(norm, dtensor_type() or ()):
            norm = norm.full_tensor()  # torch's norm of DTensors is a DTensor with pending sums
        _scale_(grads, reference.coefficient(norm.reshape(1), limit), zero_fill=False)


def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Drop-in for ``torch.nn.utils.clip_grad_value_``: clamp each element to ±clip_value.

    Element-wise clamping changes the gradient's direction; it is torch's own code that does it.
    """
    _torch_clip_grad_value_(parameter_list(parameters), clip_value, foreach)


def _clip(
    parameters: Parameters,
    max_norm: float | Tensor,
    order: float,
    nonfinite: str,
    process_group: Any,
    backend: str,
    strict: bool,
) -> Tensor:
    tensors = parameter_list(parameters)
    if torch.compiler.is_compiling():
        if process_group is None and not any(is_sharded(tensor) for tensor in tensors):
            return _compiled_clip(tensors, max_norm, order, nonfinite, backend)
        return _clip_outside_the_graph(
            tensors, max_norm, order, nonfinite, process_group, backend, strict
        )
    if process_group is not None:
        from fusedclip import distributed

        distributed.check_process_group(process_group)
    grads = gather(
        tensors,
        select.resolve(backend),
        strict=strict,
        norm_type=order,
        uncounted=frozenset() if process_group is None else _uncounted(tensors),
    )
    return clip_gathered(parameters, grads, max_norm, order, nonfinite, process_group, strict)


def _clip_outside_the_graph(*arguments: Any) -> Tensor:
    """The same as a graph break: the compiler does not trace what runs collectives."""
    norm: Tensor = torch.compiler.disable(_clip)(*arguments)  # type: ignore[no-untyped-call]
    return norm


# The mark that torch.compiler.disable() sets; calling that here would import the compiler.
_clip_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _uncounted(tensors: Sequence[Tensor]) -> frozenset[int]:
    """The positions of the parameters that say that another rank counts them."""
    return frozenset(
        i for i, tensor in enumerate(tensors) if not getattr(tensor, "fusedclip_counted", True)
    )


def clip_gathered(
    parameters: Parameters,
    grads: Gradients,
    max_norm: float | Tensor,
    order: float,
    nonfinite: str,
    process_group: Any,
    strict: bool,
) -> Tensor:
    infinity = order == math.inf
    alone = grads.shards is None and process_group is None
    # torch has no infinity norm for an empty tensor; to the strict functions it adds nothing.
    summable = order == 2.0 or (infinity and (strict or not grads.any_empty_tensor))
    if summable and alone:
        norm = _fused_clip_(grads, max_norm, infinity, nonfinite)
        if norm is not None:
            if nonfinite == "error":
                _raise_if_nonfinite(norm, grads, order, parameters)
            return norm
    if grads.empty and process_group is None:
        return torch.tensor(0.0)
    with torch.no_grad():
        if summable:
            total = _total(grads, infinity, process_group)
            norm = total.value if infinity else total.value.sqrt()
        elif alone:
            norm, total = reference.total_norm([grad for _, grad in grads.tensors()], order), None
        else:
            total = _total_of_norms(grads, order, process_group)
            norm = reference.norm_of_power_sum(total.value, order)
        norm = norm.to(grads.norm_dtype)
        if nonfinite == "error":
            _raise_if_nonfinite(norm, grads, order, parameters, None if alone else total)
        zero = nonfinite == "zero"
        factor = reference.coefficient(norm.reshape(1), max_norm, zero_nonfinite=zero)
        _scale_(grads, factor, zero_fill=zero)
    return norm


def _fused_clip_(
    grads: Gradients, max_norm: float | Tensor, infinity: bool, nonfinite: str
) -> Tensor | None:
    """Everything in one native call, where one backend has all gradients; else ``None``."""
    if grads.only_cpu and isinstance(max_norm, float):
        return cpu.clip_(grads.cpu, max_norm, infinity=infinity, nonfinite=nonfinite)
    if grads.only_one_gpu:
        if grads.cuda:
            return cuda.clip_(grads.cuda[0], max_norm, infinity=infinity, nonfinite=nonfinite)
        return triton.clip_(grads.triton[0], max_norm, infinity=infinity, nonfinite=nonfinite)
    return None


def _total(grads: Gradients, infinity: bool, process_group: Any) -> "distributed.Total":
    """Σ|g|² or max|g| over all ranks."""
    from fusedclip import distributed

    holders = [LOCAL] if grads.shards is None else grads.shards.holders
    segments = None if grads.shards is None else grads.shards.segments
    sums = _measure(grads, infinity, segments, len(holders))
    if grads.shards is not None and grads.shards.partial:
        from fusedclip.partial import measure_partial

        order = math.inf if infinity else 2.0
        measure_partial(grads.shards, order=order, per_tensor=False, sums=sums)
    return distributed.reduce(sums, holders, process_group, infinity=infinity)


def _total_of_norms(grads: Gradients, order: float, process_group: Any) -> "distributed.Total":
    """What a norm of any order is made of, over all ranks: torch's norm of the tensors' norms."""
    from fusedclip import distributed

    if grads.shards is None:
        powers = _tensor_powers(grads, order, 1 + max((i for i, _ in grads.tensors()), default=0))
        holders = [LOCAL] * len(powers)
    else:
        powers = _tensor_powers(grads, order, len(grads.shards.segments))
        holders = grads.shards.segment_holders()
    return distributed.reduce_norms(powers, holders, process_group, order)


def _tensor_powers(grads: Gradients, order: float, length: int) -> Tensor:
    """``reference.power_sum`` of each whole tensor, fp64 ``[length]`` by position."""
    if order in (2.0, math.inf):
        powers = _measure(grads, order == math.inf, range(length), length)
    else:
        nothing = math.inf if order == -math.inf else 0.0
        powers = torch.full((length,), nothing, dtype=torch.float64, device=grads.device)
        for index, grad in grads.tensors():
            # A shard may be empty; torch says for which orders a whole tensor may be.
            if grad.numel() or grads.shards is None:
                powers[index] = reference.power_sum(grad, order)
    if grads.shards is None:
        return powers
    from fusedclip import distributed
    from fusedclip.partial import measure_partial

    measure_partial(grads.shards, order=order, per_tensor=True, sums=powers)
    return distributed.reduce_each(powers, grads.shards.segment_holders(), order)


def _measure(
    grads: Gradients, infinity: bool, segments: Sequence[int] | None, num_segments: int
) -> Tensor:
    """Σ|g|² or max|g| per segment, fp64 ``[num_segments]`` on the first gradient's device.

    Args:
        segments: of each gradient, by its position in ``parameters``; ``None``: all are of 0.
    """
    total = None
    for part in grads.parts:
        out = torch.empty(num_segments, dtype=torch.float64, device=part.device)
        own = (
            None
            if segments is None or num_segments == 1
            else [segments[index] for index in part.indices]
        )
        part.backend.measure(part.grads, own, infinity=infinity, out=out)
        if total is None:
            total = out
        else:
            out = out.to(total.device, non_blocking=True)
            total = torch.maximum(total, out) if infinity else total + out
    if total is None:
        return torch.zeros(num_segments, dtype=torch.float64, device=grads.device)
    return total


def _scale_(grads: Gradients, factor: Tensor, zero_fill: bool) -> None:
    for part in grads.parts:
        part.backend.scale_(part.grads, None, factor.to(part.device), zero_fill=zero_fill)


def _raise_if_nonfinite(
    norm: Tensor,
    grads: Gradients,
    order: float,
    parameters: Parameters,
    total: "distributed.Total | None" = None,
) -> None:
    if not bool(norm.isfinite()):
        culprits = _culprits(grads, parameters, None if total is None else total.rank)
        raise NonfiniteGradientError(order, culprits if total is None else total.exchange(culprits))


def _culprits(grads: Gradients, parameters: Parameters, rank: int | None) -> list[Culprit]:
    bad = grads.nonfinite_indices()
    return [
        Culprit(index, grads.shape(index, grad), parameter_name(parameters, index), rank)
        for index, grad in grads.tensors()
        if index in bad
    ]


def _checked_max_norm(max_norm: float | Tensor) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        if max_norm.dim() != 0 or max_norm.is_complex():
            raise ValueError(
                f"max_norm: expected a number or a real 0-dim tensor, got shape "
                f"{tuple(max_norm.shape)}, {max_norm.dtype}"
            )
        if max_norm.device.type != "cpu" or torch.compiler.is_compiling():
            return max_norm  # its value is on the device; reading it would wait for the device
        max_norm = max_norm.item()
    # float first: asking the abstract class is slow.
    elif isinstance(max_norm, bool) or not isinstance(max_norm, (float, numbers.Real)):
        raise TypeError(
            f"max_norm: expected a number or a 0-dim tensor, got {type(max_norm).__name__}"
        )
    limit = float(max_norm)
    if not limit >= 0.0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {limit}")
    return limit


def _checked_norm_type(norm_type: float) -> float:
    try:
        order = float(norm_type)
    except (TypeError, ValueError) as error:
        raise type(error)(f"norm_type: expected a number or 'inf', got {norm_type!r}") from None
    if math.isnan(order):
        raise ValueError("norm_type: expected a number or 'inf', got NaN")
    return order


def _compiled_clip(
    tensors: Any, max_norm: float | Tensor, order: float, nonfinite: str, backend: str
) -> Tensor:
    """The same clip as an opaque operator, so that ``torch.compile`` keeps one graph."""
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    if not isinstance(max_norm, Tensor):
        max_norm = torch.tensor(max_norm, dtype=torch.float64, device="cpu")
    norm: Tensor = torch.ops.fusedclip.clip_(grads, max_norm, order, nonfinite, backend)
    return norm
