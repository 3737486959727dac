"""All measurements and the pages made of them: ``python -m bench.everything``, or ``make bench``.

Each section is measured in a process of its own and leaves ``bench/results/NAME.json``; ``page``
then writes the tables and pictures of README.md and docs/ from these files.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import page
from .section import RESULTS

# Where the frameworks are: `make test-integrations` makes it.
_FRAMEWORKS = Path(__file__).parent.parent / ".venv-integrations" / "bin" / "python"

# Seconds for each comparison, so that all of it takes about twenty minutes on two cores.
SECONDS = {
    "step": 4.0, "cpu": 4.0, "sweep": 3.0, "amp": 4.0, "clipper": 4.0, "monitor": 6.0,
    "distributed": 8.0, "accuracy": 1.0, "frameworks": 4.0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.everything", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the time for each comparison")
    parser.add_argument("--only", nargs="*", choices=list(SECONDS), help="sections")
    arguments = parser.parse_args(argv)
    status = 0
    for name in arguments.only or SECONDS:
        begin = time.perf_counter()
        module = ["bench"] if name == "cpu" else [f"bench.{name}"]
        file = RESULTS / f"{name}.json"
        python = str(_FRAMEWORKS) if name == "frameworks" else sys.executable
        if not Path(python).exists():
            print(f"{name}: not measured, there is no {python} (make test-integrations)\n")
            continue
        command = [*module, "--seconds", str(arguments.scale * SECONDS[name]), "--json", str(file)]
        done = subprocess.run([python, "-m", *command], cwd=Path(__file__).parent.parent)
        status = status or done.returncode
        print(f"{name}: {time.perf_counter() - begin:.0f} s, exit status {done.returncode}\n")
    page.write()
    return status


if __name__ == "__main__":
    sys.exit(main())
