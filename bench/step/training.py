"""The clip timed in place: two trainings from one seed, one with torch's clip, one with ours."""

import math
import time

import torch

from .models import LOOPS, Training
from .turns import CONTESTANTS, Clip, Times, Turn, size

_SEED = 0
_WARM_UP = 2  # steps
_LOOSE = 1e9
_TIGHT = 0.1  # of the norm of the step before, so that every step is clipped


class Arm:
    """One training and its clip."""

    def __init__(self, training: Training, clip: Clip) -> None:
        self.training = training
        self.clip = clip
        self.norm = math.inf

    def step(self, clipped: bool) -> tuple[float, float]:
        """Seconds of the clip, and of the whole step."""
        parameters, optimizer = self.training.parameters, self.training.optimizer
        max_norm = _TIGHT * self.norm if clipped else _LOOSE
        begin = time.perf_counter()
        optimizer.zero_grad()
        self.training.loss().backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        norm = self.clip(parameters, max_norm)
        after = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        self.norm = norm.item()
        return after - before, end - begin


class Arms:
    def __init__(self, loop: str) -> None:
        self.arms = {}
        for name, clip in CONTESTANTS.items():
            torch.manual_seed(_SEED)
            self.arms[name] = Arm(LOOPS[loop].make(), clip)
        for arm in self.arms.values():
            for _ in range(_WARM_UP):
                arm.step(clipped=False)

    def size(self) -> dict[str, int]:
        return size(self.arms["torch"].training.parameters)

    def turn(self, turn: Turn) -> Times:
        """The clips by contestant, and as "torch step" and so on the whole steps."""
        times: Times = {name + what: [] for name in CONTESTANTS for what in ("", " step")}
        for names in turn.rounds():
            for name in names:
                for _ in range(turn.block):
                    clip, step = self.arms[name].step(turn.clipped)
                    times[name].append(clip)
                    times[f"{name} step"].append(step)
        return times
