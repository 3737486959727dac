"""Cases that fail, to show that the tests would see it."""

import torch.distributed as dist

from tests.distributed.processes import Case


def fails_on_one_rank() -> None:
    assert dist.get_rank() == 0, "this rank is wrong"


def passes() -> None:
    dist.barrier()


CASES: dict[int, dict[str, Case]] = {2: {"passes": passes, "fails": fails_on_one_rank}}
