"""Megatron-core clips with fusedclip.

``get_grad_norm_fp32`` and ``clip_grad_by_total_norm_fp32``, by which every optimizer of
``megatron.core.optimizer`` clips, are replaced. Which gradients are counted, the process groups and
the order of their all-reduces stay as they are. What is added up over ranks is Σ|g|^p itself, in
fp64, where Megatron takes the root on each rank and raises it again in fp32.

>>> fusedclip.integrations.megatron.patch()
>>> update_successful, grad_norm, num_zeros = optimizer.step()
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedclip.backends import reference
from fusedclip.checks import checked_norm_type
from fusedclip.integrations.seams import Function, Seam, Seams
from fusedclip.integrations.tensors import gathered, scale_tensors_
from fusedclip.pipeline import tensor_powers
from fusedclip.rule import GLOBAL
from fusedclip.sharded.reduce import all_reduce
from fusedclip.sharded.topology import device_for


def patch() -> Seams:
    """Let Megatron's optimizers clip with fusedclip; also as ``with patch():``.

    Optimizers that exist already are changed as well. Calling it again changes nothing. When a
    function of the installed Megatron-core is not as known, a warning names it and nothing is
    patched.

    Raises:
        ModuleNotFoundError: Megatron-core is not installed.
    """
    import megatron.core  # noqa: F401

    return _seams.patch()


def unpatch() -> None:
    """Undo every ``patch()``, exactly; harmless when nothing is patched."""
    _seams.unpatch()


def _norm(original: Function) -> Function:
    del original

    def get_grad_norm_fp32(
        grads_for_norm: list[Tensor] | Tensor,
        norm_type: float = 2,
        grad_stats_parallel_group: Any = None,
    ) -> float:
        """The norm of the gradients of all ranks, as a number.

        Two ranks of the group must not list the same gradient. A DTensor is taken for what its
        local tensor is, and the ranks of its mesh are added up first.
        """
        from megatron.core.utils import get_data_parallel_group_if_dtensor, to_local_if_dtensor

        grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else list(grads_for_norm)
        order = checked_norm_type(norm_type)
        mesh_group: Any = None
        for grad in grads:
            mesh_group = get_data_parallel_group_if_dtensor(grad, mesh_group)
        world = dist.group.WORLD if grad_stats_parallel_group is None else grad_stats_parallel_group
        operation = reference.operation_of(order)
        with torch.no_grad():
            if grads:
                local = gathered([to_local_if_dtensor(grad) for grad in grads])
                powers = tensor_powers(local, order, len(grads))
                total = reference.combined(powers, GLOBAL, order)[0]
            else:
                device = device_for(world, torch.device("cpu"))
                total = torch.zeros((), dtype=torch.float64, device=device)
            for group in (mesh_group, world):
                if group is not None:
                    total = all_reduce(total, operation, group)
            return float(reference.norm_of_power_sum(total, order).item())

    return get_grad_norm_fp32


def _clip(original: Function) -> Function:
    del original

    def clip_grad_by_total_norm_fp32(
        parameters: Iterable[Tensor] | Tensor,
        max_norm: float,
        total_norm: float,
        use_decoupled_grad: bool = False,
    ) -> None:
        """``g ← g · max_norm / (total_norm + 1e-6)`` where that is below 1.

        A total norm of NaN leaves the gradients as they are.
        """
        from megatron.core.utils import to_local_if_dtensor

        name = "decoupled_grad" if use_decoupled_grad else "grad"
        found = (getattr(parameter, name, None) for parameter in parameters)
        grads = [to_local_if_dtensor(grad) for grad in found if grad is not None]
        coefficient = max_norm / (total_norm + 1e-6)
        if grads and coefficient < 1.0:
            scale_tensors_(
                grads, torch.full((), coefficient, dtype=torch.float64, device=grads[0].device)
            )

    return clip_grad_by_total_norm_fp32


_CLIP_GRADS = "megatron.core.optimizer.clip_grads"

_seams = Seams(
    "fusedclip.integrations.megatron",
    [
        Seam(_CLIP_GRADS, "get_grad_norm_fp32",
             ("grads_for_norm", "norm_type", "grad_stats_parallel_group"), _norm,
             needs=("get_data_parallel_group_if_dtensor", "to_local_if_dtensor")),
        Seam(_CLIP_GRADS, "clip_grad_by_total_norm_fp32",
             ("parameters", "max_norm", "total_norm", "use_decoupled_grad"), _clip,
             needs=("to_local_if_dtensor",)),
    ],
)  # fmt: skip
