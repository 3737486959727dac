"""The order of collectives, on simulated clusters: all ranks finish, with the right sums.

Each simulated rank runs its steps in its own order; a step ends when all ranks of its group are at
it, as with real collectives.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedclip.sharded import topology
from fusedclip.sharded.topology import Topology, _topology, device_for

WORLD = tuple(range(16))


@dataclass(frozen=True)
class Mesh:
    """What ``topology`` asks of a DeviceMesh, as one rank sees it; a group is its ranks."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    mesh: torch.Tensor = field(compare=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def get_coordinate(self) -> list[int]:
        return (self.mesh == self.rank).nonzero()[0].tolist()

    def get_group(self, dimension: int) -> tuple[int, ...]:
        index: list[Any] = self.get_coordinate()
        index[dimension] = slice(None)
        return tuple(self.mesh[tuple(index)].tolist())


def seen_by(rank: int, grid: torch.Tensor) -> Mesh:
    return Mesh(tuple(grid.shape), tuple(grid.flatten().tolist()), rank, grid)


def found_by(rank: int, grids: list[torch.Tensor], world_size: int = 99) -> Topology:
    meshes = tuple(seen_by(rank, grid) for grid in grids if rank in grid)
    return _topology.__wrapped__(meshes, WORLD, world_size)


def simulate(found: dict[int, Topology]) -> dict[int, dict[tuple[int, ...], int]]:
    """The value of each domain on each rank, from 10^rank on each; raises on a deadlock."""
    values = {r: [10**r] * len(t.domains) for r, t in found.items()}
    position = dict.fromkeys(found, 0)
    while any(position[r] < len(t.steps) for r, t in found.items()):
        waiting = {r: t.steps[position[r]] for r, t in found.items() if position[r] < len(t.steps)}
        ready = [
            step.group
            for step in waiting.values()
            if all(r in waiting and waiting[r].group == step.group for r in step.group)
        ]
        if not ready:
            raise RuntimeError(f"deadlock: {waiting}")
        group = ready[0]
        packed = [[values[r][i] for i in waiting[r].domains] for r in group]
        assert len({len(part) for part in packed}) == 1, "vectors of different lengths"
        sums = [sum(column) for column in zip(*packed, strict=True)]
        for r in group:
            for i, value in zip(waiting[r].domains, sums, strict=True):
                values[r][i] = value
            position[r] += 1
    return {r: dict(zip(t.domains, values[r], strict=True)) for r, t in found.items()}


def assert_right(grids: list[torch.Tensor], world_size: int = 99) -> dict[int, Topology]:
    found = {rank: found_by(rank, grids, world_size) for rank in WORLD}
    for values in simulate(found).values():
        for domain, value in values.items():
            assert value == sum(10**rank for rank in domain)
    for t in found.values():
        groups = [step.group for step in t.steps]
        regular = all(topology.layout(mesh).regular for mesh in t.position)
        assert not regular or len(set(groups)) == len(groups), "a group is used twice"
    return found


def slices(grid: torch.Tensor, dimensions: tuple[int, ...]) -> list[torch.Tensor]:
    """All sub-meshes of a mesh along some of its dimensions."""
    others = [d for d in range(grid.ndim) if d not in dimensions]
    moved = grid.permute(*others, *dimensions)
    return list(moved.reshape(-1, *(grid.shape[d] for d in dimensions)))


CUBE = torch.arange(16).reshape(2, 4, 2)


@given(
    st.lists(
        st.sampled_from([d for n in (1, 2, 3) for d in itertools.permutations(range(3), n)]),
        min_size=1,
        max_size=4,
    )
)
def test_slices_of_one_mesh(chosen: list[tuple[int, ...]]) -> None:
    """Any mix of slices of a 2 × 4 × 2 mesh, in any order of dimensions."""
    assert_right([grid for dimensions in chosen for grid in slices(CUBE, dimensions)])


@given(st.data())
def test_any_meshes(data: st.DataObject) -> None:
    """Meshes over arbitrary ranks, most of them without any regularity."""
    grids = []
    for shape in data.draw(st.lists(st.sampled_from([(2,), (3,), (2, 2), (2, 3), (2, 2, 2)]))):
        ranks = data.draw(st.permutations(WORLD))[: torch.Size(shape).numel()]
        grids.append(torch.tensor(ranks).reshape(shape))
    assert_right(grids)


def test_the_world_needs_one_collective() -> None:
    found = assert_right([CUBE, *slices(CUBE, (1,))], world_size=16)
    assert all(len(t.steps) == 2 for t in found.values())
    found = assert_right([CUBE], world_size=16)
    assert all([step.group for step in t.steps] == [WORLD] for t in found.values())


def test_the_flattest_mesh_of_a_domain_adds_it_up() -> None:
    found = assert_right([CUBE, CUBE.flatten()])
    assert all(len(t.steps) == 1 for t in found.values())


def test_a_shared_group_is_used_once() -> None:
    """FSDP×TP with some parameters on the FSDP dimension alone, inside a pipeline."""
    found = assert_right([*slices(CUBE, (1, 2)), *slices(CUBE, (1,))])
    for t in found.values():
        assert sorted(len(step.domains) for step in t.steps) == [1, 2]


def test_the_simulation_sees_a_wrong_order() -> None:
    """The twin: ranks that sort by first rank alone wait for each other."""
    found = {rank: found_by(rank, slices(CUBE, (1, 2))) for rank in WORLD}
    found[0] = Topology(found[0].domains, found[0].steps[::-1], found[0].position)
    with pytest.raises((RuntimeError, AssertionError)):
        for values in simulate(found).values():
            for domain, value in values.items():
                assert value == sum(10**rank for rank in domain)


@dataclass(frozen=True)
class Group:
    _device_types: list[torch.device]


def test_the_number_goes_to_the_device_of_the_group() -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert device_for(Group([cpu]), cpu) == cpu
    assert device_for(Group([other, cpu]), cpu) == cpu
    with mock.patch.object(topology, "_current_index", lambda kind: 3):
        assert device_for(Group([torch.device("cuda")]), cpu) == torch.device("cuda", 3)
    assert device_for(Group([cpu]), other) == cpu
