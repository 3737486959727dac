"""DTensors on two real ranks: the functions behind torch's names against torch's own."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import fusedclip
from tests.distributed.processes import Case
from tests.under_torch.gradients import plain
from tests.under_torch.steps import FUNCTIONS, MAGNITUDES, Step, difference, outcome

PLACEMENTS: dict[str, tuple[tuple[int, ...], Sequence[Any]]] = {
    "1-D": ((2,), (Shard(0),)),
    "2-D": ((1, 2), (Replicate(), Shard(0))),
    "2-D, replicated": ((2, 1), (Replicate(), Shard(0))),
    "pending": ((2,), (Partial(),)),
}


def _case(function: str, magnitude: str, shape: tuple[int, ...], placements: Sequence[Any]) -> Case:
    def case() -> None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
        step = Step(function)

        def call() -> Sequence[Any]:
            grads = plain(MAGNITUDES[magnitude])
            return step(*[distribute_tensor(grad, mesh, placements) for grad in grads])

        torchs = outcome(call)
        with fusedclip.patch():
            ours = outcome(call)
        problem = difference(ours, torchs)
        assert not problem, problem

    return case


_named: dict[str, Callable[[], None]] = {
    f"DTensor {layout}-two ranks-{function}-{magnitude}": _case(function, magnitude, *described)
    for layout, described in PLACEMENTS.items()
    for function in FUNCTIONS
    for magnitude in MAGNITUDES
}
CASES: dict[int, dict[str, Case]] = {2: _named}
