"""What a process of the measurement does: it answers requests for times, one JSON line each.

The processes differ in which fusedclip they import, and in nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import fusedclip

from .calls import Amount, Calls, Spec


def serve(threads: int) -> None:
    """Until standard input ends."""
    torch.set_num_threads(threads)
    _answer({"root": str(Path(fusedclip.__file__).parent.parent), **_abilities()})
    of: Any = None
    state: Calls | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["of"] != of:
            state = None  # its memory first
            of, state = request["of"], Calls(Spec(**request["of"]))
        assert state is not None
        _answer(state.turn(Amount(**request["amount"])))


def _abilities() -> dict[str, Any]:
    return {"version": fusedclip.__version__, "cpu": fusedclip.available_backends()["cpu"]}


def _answer(data: Any) -> None:
    print(json.dumps(data), flush=True)
