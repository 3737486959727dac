"""What integrations need beside the public functions: to rescale tensors that are no parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedclip.backends import select
from fusedclip.gradients import Gradients, gather
from fusedclip.pipeline import scale_


def gathered(tensors: Sequence[Tensor]) -> Gradients:
    """The tensors themselves, for the kernels; one that is listed twice is taken twice."""
    return gather(
        tensors, select.resolve("auto"), from_parameters=False, deduplicate=False, strict=False,
        must_take_all=True,
    )  # fmt: skip


def scale_tensors_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by ``factor``, one value; 1 writes nothing on a CPU and no host waits."""
    with torch.no_grad():
        scale_(gathered(tensors), factor.double().reshape(1))
