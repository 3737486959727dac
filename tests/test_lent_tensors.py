"""What a collective sends stays until torch's thread has let go of it; gloo, one process.

A fake collective keeps a reference of C++, as gloo's work does, and drops it when the test says so.
"""

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedclip
from fusedclip.errors import Culprit
from fusedclip.sharded import reduce as distributed


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Thread:
    """Holds the tensors of its works until ``let_go``."""

    def __init__(self) -> None:
        self.works: list[Tensor] = []

    def double(self, tensor: Tensor, group: Any) -> None:
        work = tensor.detach()
        work.grad = tensor
        self.works.append(work)
        tensor.mul_(2)

    def fail(self, tensor: Tensor, group: Any) -> None:
        self.double(tensor, group)
        raise RuntimeError("timed out")

    def references(self) -> list[int]:
        """Of C++, without the work's own."""
        return [work.grad._use_count() - 1 for work in self.works if work.grad is not None]

    def let_go(self) -> None:
        self.works.clear()


def send(thread: Thread, values: Tensor) -> None:
    distributed.collective(thread.double, values, group=None)


@pytest.mark.parametrize("inference", [False, True])
def test_kept_until_the_thread_lets_go(inference: bool) -> None:
    """Two references stay while it holds one: dropping that one never needs the GIL."""
    thread, idle = Thread(), Thread()
    with torch.inference_mode(inference):
        for size in (1, 4, 1):  # of different sizes and types, one after the other
            for dtype in (torch.float64, torch.uint8):
                values = torch.ones(size, dtype=dtype)
                send(thread, values)
                assert torch.equal(values, torch.full_like(values, 2))
                del values
    assert thread.references() == [2] * 6
    assert len(distributed._on_loan) == 6
    thread.let_go()
    send(idle, torch.ones(1))
    assert len(distributed._on_loan) == 1  # that of the idle one
    idle.let_go()
    distributed.collective(lambda tensor, group: None, torch.ones(1), group=None)
    assert not distributed._on_loan


def test_the_twin_without_a_loan() -> None:
    """A tensor that is merely sent leaves its Python object's reference, which needs the GIL."""
    thread = Thread()
    thread.double(torch.ones(1), None)
    assert thread.references() == [1]


def test_kept_when_the_collective_fails(group: Any) -> None:
    thread = Thread()
    with pytest.raises(RuntimeError, match=r"over ranks \[0\] failed: timed out"):
        distributed.collective(thread.fail, torch.ones(1), group=group)
    assert thread.references() == [2]
    thread.let_go()
    distributed.collective(lambda tensor, group: None, torch.ones(1), group=None)
    assert not distributed._on_loan


def test_views_of_a_result_are_no_loan(group: Any) -> None:
    """A norm of fp64 is a view of what the all-reduce gave: keeping many keeps no loans."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    norms = []
    for factor in range(1, 100):
        p.grad = torch.full_like(p, factor)
        norms.append(fusedclip.clip_([p], math.inf, process_group=group))
    assert [norm.item() for norm in norms] == pytest.approx(
        [factor * math.sqrt(3) for factor in range(1, 100)]
    )
    assert len(distributed._on_loan) < 10  # at most what gloo's threads hold just now


def test_many_threads() -> None:
    """Each looks after the others' loans too, and never after one that is not sent yet."""
    worst: list[int] = []

    def clip() -> None:
        for _ in range(300):
            thread = Thread()
            send(thread, torch.ones(1))
            worst.extend(thread.references())

    workers = [threading.Thread(target=clip) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert worst == [2] * 1200
    distributed.collective(lambda tensor, group: None, torch.ones(1), group=None)
    assert not distributed._on_loan


def test_items_of_all_ranks(group: Any) -> None:
    items = [Culprit(1, (2, 3), "layer.weight", 0), None, "é" * 1000]
    assert distributed.all_gather(items, group) == items
    assert distributed.all_gather([], group) == []
