"""reduce: a process's total → the total over the ranks of a process group."""

from typing import Any

import torch
from torch import Tensor


def reduce(total: Tensor, process_group: Any, *, infinity: bool) -> Tensor:
    """Σ|g|² (SUM) or max|g| (MAX) over ``process_group``; ``None`` leaves the total as it is.

    One all-reduce of one fp64 scalar; ranks without gradients must take part with a total of 0.
    """
    if process_group is None:
        return total
    op = torch.distributed.ReduceOp.MAX if infinity else torch.distributed.ReduceOp.SUM
    torch.distributed.all_reduce(total, op=op, group=process_group)
    return total
