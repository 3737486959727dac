"""What a process of the measurement does: it answers requests for times, one JSON line each.

The processes differ in which fusedclip they import, and in nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import fusedclip

from .calls import Calls, Gradients
from .training import Arms
from .turns import Turn


def serve(threads: int) -> None:
    """Until standard input ends."""
    torch.set_num_threads(threads)
    _answer({"root": str(Path(fusedclip.__file__).parent.parent), **_abilities()})
    of: Any = None
    state: Calls | Arms | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["of"] != of:
            state = None  # its memory first
            of, state = request["of"], _set_up(**request["of"])
        assert state is not None
        turn = request["turn"]
        _answer(state.size() if turn is None else state.turn(Turn(**turn)))


def _set_up(gradients: dict[str, Any] | None = None, loop: str | None = None) -> Calls | Arms:
    if loop is not None:
        return Arms(loop)
    assert gradients is not None
    return Calls(Gradients(**gradients))


def _abilities() -> dict[str, Any]:
    return {"version": fusedclip.__version__, "cpu": fusedclip.available_backends()["cpu"]}


def _answer(data: Any) -> None:
    print(json.dumps(data), flush=True)
