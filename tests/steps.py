"""Steps, each a process with a time limit: one that hangs or fails costs itself alone.

Into the folder go ``log.txt``, all that the steps print, and ``steps.json``: of each step how it
ended, its seconds and its limit, written anew when one begins and when it ends. A step's process
writes to the log itself, so what it printed is there whoever is killed.
"""

import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from bench.json_file import write_whole

_ROOT = Path(__file__).parent.parent
_GRACE = 5.0  # seconds between asking for a stack, killing and giving up
_LAST_LINES = 12


@dataclass(frozen=True)
class Step:
    """A command; ``quiet``: its output goes to the log, its last lines to the terminal as well."""

    name: str
    command: Sequence[str]
    seconds: float  # at most
    variables: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""  # the step that has to run before it
    quiet: bool = False


def run(steps: Sequence[Step], folder: Path, within: float | None = None) -> bool:
    """All steps, in turn; whether all were well.

    Args:
        within: seconds for all of them; the last ones get what is left or are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = None if within is None else time.monotonic() + within
    good = True
    for step in steps:
        left = step.seconds if end is None else min(step.seconds, end - time.monotonic())
        if left <= 0:
            outcome = {"outcome": "left out", "seconds": 0.0, "limit": 0.0}
        else:
            _note(folder, step, {"outcome": "running", "seconds": 0.0, "limit": left})
            outcome = _run(step, folder / "log.txt", left)
        _note(folder, step, outcome)
        good = good and outcome["outcome"] == "ok"
    return good


def summary(folder: Path) -> str:
    """A line for each step that ``folder`` knows of."""
    return "\n".join(
        f"{own['outcome']:<10} {own['seconds']:6.1f} s of {own['limit']:4.0f}  {name}"
        for name, own in json.loads((folder / "steps.json").read_text()).items()
    )


def _note(folder: Path, step: Step, outcome: Mapping[str, object]) -> None:
    file = folder / "steps.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known.pop(step.name, None)
    write_whole({**known, step.name: outcome}, file)


def _run(step: Step, path: Path, limit: float) -> dict[str, object]:
    begin = time.monotonic()
    with path.open("ab") as log, path.open("rb") as reader:
        _say(log, f"\n=== {step.name}, at most {limit:.0f} s\n$ {shlex.join(step.command)}\n")
        reader.seek(0, os.SEEK_END)
        echo = _nothing if step.quiet else functools.partial(_echo, reader)
        outcome = _watched(step, log, limit, echo)
        if step.quiet:
            lines = reader.read().decode(errors="replace").splitlines()
            print(*lines[-_LAST_LINES:], sep="\n")
        seconds = time.monotonic() - begin
        _say(log, f"=== {step.name}: {outcome} after {seconds:.1f} s\n")
    return {"outcome": outcome, "seconds": round(seconds, 1), "limit": limit}


def _watched(step: Step, log: BinaryIO, limit: float, echo: Callable[[], None]) -> str:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    try:
        process = subprocess.Popen(
            step.command, cwd=_ROOT, env={**environment, **step.variables},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{error}\n".encode())
        log.flush()
        echo()
        return "failed"
    try:
        if _ended(process, limit, echo):
            return "ok" if process.returncode == 0 else f"failed ({process.returncode})"
        return "timed out"
    finally:  # also where this process is told to end
        _end(process)
        echo()


def _ended(process: subprocess.Popen[bytes], limit: float, echo: Callable[[], None]) -> bool:
    """Whether it came to an end before its limit; ``echo`` is called meanwhile."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        echo()
        try:
            process.wait(min(0.1, max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            continue
        return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all its children. SIGABRT first: Python then writes where each thread stands.

    What waits in the driver may outlive both signals: it is left behind.
    """
    for kind in (signal.SIGABRT, signal.SIGKILL):
        if process.poll() is not None:
            break
        _signal(process, kind)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    _signal(process, signal.SIGKILL)  # children that it left


def _signal(process: subprocess.Popen[bytes], kind: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, kind)


def _say(log: BinaryIO, text: str) -> None:
    log.write(text.encode())
    log.flush()
    print(text, end="", flush=True)


def _echo(reader: BinaryIO) -> None:
    """Passes on to the terminal what has come into the log."""
    print(reader.read().decode(errors="replace"), end="", flush=True)


def _nothing() -> None:
    pass
