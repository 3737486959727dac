"""A busy machine: one endless loop for each core."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# It says that it runs, and ends by itself should the measurement be killed.
_LOOP = """
import os, sys
parent = int(sys.argv[1])
print(flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def endless_loops(count: int | None = None) -> Iterator[list[int]]:
    """As many as this process may use cores; yields the ids of their processes."""
    count = _cores() if count is None else count
    loops = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", _LOOP, str(os.getpid())], stdout=subprocess.PIPE
        )
        for _ in range(count)
    ]
    try:
        for loop in loops:
            assert loop.stdout is not None
            loop.stdout.readline()
        yield [loop.pid for loop in loops]
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
