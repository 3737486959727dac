"""Parameters that another rank counts, with a process group of one rank: they count nowhere."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedclip
from tests.helpers import parameters


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _params() -> list[nn.Parameter]:
    """Gradients 3, which counts, and 4, which does not."""
    params = parameters(torch.tensor([3.0]), torch.tensor([4.0]))
    params[1].fusedclip_counted = False
    return params


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("order", [2.0, math.inf, 1.0, 3.0])
class TestOneRank:
    def test_clip(self, group: dist.ProcessGroup, backend: str, order: float) -> None:
        params = _params()
        norm = fusedclip.clip_(params, 1.5, order, process_group=group, backend=backend)
        assert norm == 3.0
        assert params[0].grad.item() == pytest.approx(1.5, rel=1e-6)
        assert params[1].grad.item() == pytest.approx(2.0, rel=1e-6)  # scaled like all others

    def test_groups(self, group: dist.ProcessGroup, backend: str, order: float) -> None:
        optimizer = torch.optim.SGD(_params(), lr=1.0)
        clipper = fusedclip.Clipper(
            optimizer, 1.5, norm_type=order, scope="group", process_group=group, backend=backend
        )
        assert clipper.clip_().tolist() == pytest.approx([3.0])

    def test_parameters(self, group: dist.ProcessGroup, backend: str, order: float) -> None:
        clipper = fusedclip.Clipper(
            _params(), 1.5, norm_type=order, scope="parameter", process_group=group, backend=backend
        )
        assert clipper.clip_().tolist() == pytest.approx([3.0, 0.0])

    def test_monitor(self, group: dist.ProcessGroup, backend: str, order: float) -> None:
        clipper = fusedclip.Clipper(
            _params(), 1.5, norm_type=order, monitor=True, process_group=group, backend=backend
        )
        assert clipper.clip_() == 3.0
        assert clipper.monitor is not None
        assert clipper.monitor.state_dict()["tensor_norms"].tolist() == [[3.0, 0.0]]


def test_without_a_group_everything_counts() -> None:
    """The twin: the mark is about other ranks."""
    assert fusedclip.clip_(_params(), 1.5) == 5.0
    optimizer = torch.optim.SGD(_params(), lr=1.0)
    assert fusedclip.Clipper(optimizer, 1.5, scope="group").clip_() == 5.0
    assert fusedclip.get_tensor_norms([p.grad for p in _params()]).tolist() == [3.0, 4.0]
