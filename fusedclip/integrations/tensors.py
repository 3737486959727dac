"""For integrations: rescale tensors that are not the ``.grad`` of parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedclip.backends import select
from fusedclip.gradients import Gradients, gather
from fusedclip.pipeline import scale_


def gathered(tensors: Sequence[Tensor]) -> Gradients:
    """The tensors themselves as ``Gradients``; one that is listed twice is taken twice."""
    return gather(
        tensors, select.resolve("auto"), from_parameters=False, deduplicate=False, strict=False,
        must_take_all=True,
    )  # fmt: skip


def scale_tensors_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by ``factor``, a tensor of one value. No host sync for tensors on a GPU.

    A factor of 1 writes nothing, except to tensors on a GPU that no kernel takes.
    """
    with torch.no_grad():
        scale_(gathered(tensors), factor.double().reshape(1))
