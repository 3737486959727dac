"""``fusedclip run -- COMMAND …``: a training as it is, with ``patch()`` on.

The command replaces this process, so signals and the exit status are its own. It inherits these
environment variables, as do the processes that it starts (torchrun's workers, for example):

- ``PYTHONPATH`` begins with ``fusedclip/launcher/startup``, whose sitecustomize patches torch,
  DeepSpeed and Megatron-core once a process has imported them. Python ignores it when started with
  ``-S``, ``-E`` or ``-I``.
- ``FUSEDCLIP_PATCH=1`` is the switch; a process started with ``FUSEDCLIP_PATCH=0`` is left alone.
- ``FUSEDCLIP_MAX_NORM`` is the threshold given by ``--max-norm``.
- ``FUSEDCLIP_SKIP_ABOVE`` is the norm above which a step is left out, given by ``--skip-above``.
- ``FUSEDCLIP_MONITOR=1`` is ``--monitor``: a process with rank 0 that clipped prints a summary on
  stderr when it ends.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"
# What shells report for a command that is not there, and for one that the system cannot start.
NOT_FOUND, NOT_EXECUTABLE = 127, 126


@dataclass(frozen=True)
class Options:
    max_norm: float | None = None  # in place of the one that the training passes; see ``patch``
    monitor: bool = False
    skip_above: float | None = None  # leave out a step whose norm is larger


def run(command: Sequence[str], options: Options) -> int:
    """Become ``command`` with fusedclip on; returns only where that failed.

    Args:
        command: ``train.py …`` and ``-m module …`` run with this Python, anything else is looked up
            on PATH.
    """
    try:
        words = resolve(command)
    except FileNotFoundError as error:
        print(f"fusedclip run: {error}", file=sys.stderr)
        return NOT_FOUND
    environment = {**os.environ, **settings(os.environ, options)}
    if os.name == "nt":  # exec does not wait there
        return subprocess.run(words, env=environment).returncode
    sys.stdout.flush()
    try:
        os.execve(words[0], words, environment)
    except OSError as error:  # a script without its first line "#!…", for example
        print(f"fusedclip run: {words[0]}: {error.strerror}", file=sys.stderr)
        return NOT_EXECUTABLE


def resolve(command: Sequence[str]) -> list[str]:
    """The words to execute, the first an absolute path.

    Raises:
        FileNotFoundError: there is no such script or command.
    """
    name = command[0]
    if name == "-m" or (name.endswith(".py") and Path(name).is_file()):
        return [sys.executable, *command]
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"{name}: no such command on PATH, and no such Python script in {Path.cwd()}"
        )
    return [os.path.abspath(found), *command[1:]]


def settings(environment: Mapping[str, str], options: Options) -> dict[str, str]:
    """The environment variables that switch fusedclip on in a process and its children."""
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(STARTUP), *(entry for entry in others if entry and entry != str(STARTUP))]
    chosen = {"PYTHONPATH": os.pathsep.join(path), "FUSEDCLIP_PATCH": "1"}
    if options.max_norm is not None:
        chosen["FUSEDCLIP_MAX_NORM"] = repr(options.max_norm)
    if options.skip_above is not None:
        chosen["FUSEDCLIP_SKIP_ABOVE"] = repr(options.skip_above)
    if options.monitor:
        chosen["FUSEDCLIP_MONITOR"] = "1"
    return chosen


def exports(options: Options) -> str:
    """The same as lines for a shell: ``eval "$(fusedclip run --env)"``."""
    chosen = settings(os.environ, options)
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in chosen.items())


def activate(environment: Mapping[str, str]) -> None:
    """Switch on what ``environment`` asks for; called when a process has imported torch."""
    from fusedclip.integrations.torch import patch

    limits = {
        name: checked_threshold(name, environment[variable])
        for name, variable in (
            ("max_norm", "FUSEDCLIP_MAX_NORM"),
            ("skip_above", "FUSEDCLIP_SKIP_ABOVE"),
        )
        if variable in environment
    }
    patch(max_norm=limits.get("max_norm"), skip_above=limits.get("skip_above"))
    if environment.get("FUSEDCLIP_MONITOR") == "1":
        from fusedclip.launcher.report import watch

        watch()


def checked_threshold(name: str, text: str) -> float:
    """The threshold that ``text`` is.

    Raises:
        ValueError: it is none.
    """
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0.0:
        raise ValueError(f"{name}: expected a threshold >= 0, got {text!r}")
    return limit
