"""Which process groups add up the ranks of which meshes, in an order that all ranks agree on.

A ``Domain`` is a set of ranks whose sums become one: the ranks of a mesh. All of them know it, for
every rank passes at least one parameter of each mesh it belongs to. From the ranks of the meshes
alone, which every member knows alike, follow

- the groups that add up a domain: the world's, where the domain is the world; else one for each
  mesh dimension, one after the other;
- the order of all groups: by the pattern of their ranks, then by their first rank. It is one order
  for all ranks, so no two ranks can wait for each other; and the dimensions of a regular mesh have
  the same order on all its ranks, because each dimension has one pattern;
- what a group adds up: one value for each domain that it helps to add up, so that it is used once.

A mesh without such patterns (a permutation of ranks) gets steps of its own, after all others.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Layout:
    """The ranks of a mesh."""

    grid: torch.Tensor  # [*mesh.shape] of global ranks
    ranks: tuple[int, ...]  # the same, ascending
    patterns: tuple[tuple[int, ...], ...]  # of each dimension: ranks less the first one
    regular: bool  # all lines along a dimension have its pattern

    @property
    def key(self) -> tuple[Any, ...]:
        """The same on every rank of the mesh, and no other mesh has it."""
        return self.ranks, tuple(self.grid.shape), tuple(self.grid.flatten().tolist())


@dataclass(frozen=True)
class Step:
    """One all-reduce: of the values of ``domains``, positions in ``Topology.domains``."""

    group: Any
    domains: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """What this rank takes part in."""

    domains: tuple[tuple[int, ...], ...]  # each a set of ranks, ascending
    steps: tuple[Step, ...]  # in the order of all ranks
    position: dict[Any, int]  # mesh → the index of its domain


def topology(meshes: Iterable[Any]) -> Topology:
    """The domains of ``meshes``, and the all-reduces that add up each."""
    distinct = tuple(dict.fromkeys(meshes))
    return _topology(distinct, dist.group.WORLD, world_size()) if distinct else Topology((), (), {})


@functools.lru_cache(maxsize=64)
def _topology(meshes: tuple[Any, ...], world: Any, ranks: int) -> Topology:
    """Remembered while the world and its number of ranks are the same: groups end with it."""
    chosen: dict[tuple[int, ...], Any] = {}  # domain → the mesh whose groups add it up
    for mesh in sorted(meshes, key=_cost):
        chosen.setdefault(layout(mesh).ranks, mesh)
    domains = tuple(sorted(chosen))
    steps: dict[Any, tuple[Any, list[int]]] = {}
    for index, domain in enumerate(domains):
        for key, group in _groups(chosen[domain], world, ranks):
            steps.setdefault(key, (group, []))[1].append(index)
    ordered = sorted(steps.items(), key=lambda item: item[0])
    return Topology(
        domains,
        tuple(Step(group, tuple(members)) for _, (group, members) in ordered),
        {mesh: domains.index(layout(mesh).ranks) for mesh in meshes},
    )


@functools.lru_cache(maxsize=256)
def layout(mesh: Any) -> Layout:
    """``mesh``'s ranks; computed once for each mesh."""
    grid = mesh.mesh.cpu()
    patterns = []
    regular = True
    for dimension in range(grid.ndim):
        lines = grid.movedim(dimension, -1).reshape(-1, grid.shape[dimension])
        offsets = lines - lines[:, :1]
        patterns.append(tuple(offsets[0].tolist()))
        regular &= bool((offsets == offsets[0]).all())
    return Layout(grid, tuple(sorted(grid.flatten().tolist())), tuple(patterns), regular)


def device_for(group: Any, device: torch.device) -> torch.device:
    """Where ``group`` takes tensors: ``device``, or that of its accelerator."""
    types = [candidate.type for candidate in group._device_types]
    if device.type in types:
        return device
    kind = next((kind for kind in types if kind != "cpu"), "cpu")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, _current_index(kind))


def _cost(mesh: Any) -> tuple[Any, ...]:
    """Smallest for the mesh that needs the fewest all-reduces; the same on all ranks."""
    described = layout(mesh)
    return not described.regular, len(_dimensions(mesh)), described.key


def _dimensions(mesh: Any) -> list[int]:
    return [dimension for dimension in range(mesh.ndim) if mesh.size(dimension) > 1]


def _groups(mesh: Any, world: Any, ranks: int) -> list[tuple[Any, Any]]:
    """(key, group) of the all-reduces that add up all ranks of ``mesh``."""
    described = layout(mesh)
    if len(described.ranks) == 1:
        return []
    if len(described.ranks) == ranks:
        return [((0, described.ranks, 0), world)]
    coordinate = mesh.get_coordinate()
    keyed = []
    for dimension in _dimensions(mesh):
        first = list(coordinate)
        first[dimension] = 0
        start = int(described.grid[tuple(first)])
        key = (0, described.patterns[dimension], start)
        if not described.regular:
            key = (1, described.ranks, dimension)
        keyed.append((key, mesh.get_group(dimension)))
    return keyed


def world_size() -> int:
    """The number of ranks of the process group of all."""
    return dist.get_world_size()


def _current_index(kind: str) -> int:
    return int(torch.get_device_module(kind).current_device())
