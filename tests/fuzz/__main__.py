"""Random sequences of calls until the time is up: ``python -m tests.fuzz --seconds 600 --seed 1``.

With ``--backend cuda`` the CUDA kernels run in the emulator (tests/emulator), under
AddressSanitizer. A failure is printed as a program; the same seed finds it again, and with
``--shrink`` a shorter one.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EMULATED = "FUSEDCLIP_EMULATED_MODULE"
_STEPS_EACH = 50
_EXAMPLES_EACH = 25  # of one seed
_GRIDS = ("64,3,1024,4096,1", "32,2,512,512,1", "96,5,1024,0,2")


@dataclass(frozen=True)
class Report:
    backend: str
    seed: int
    seconds: float
    sequences: int
    steps: int
    calls: int  # of fusedclip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no sequences after it")
    parser.add_argument("--sequences", type=int, help="so many instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", choices=["reference", "cpu", "cuda"], default="cpu")
    parser.add_argument("--shrink", action="store_true", help="a failure; may take long")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args(argv)
    if arguments.backend == "cuda" and _EMULATED not in os.environ:
        return _inside_the_emulator(sys.argv[1:] if argv is None else argv)
    report = fuzz(
        arguments.backend,
        arguments.seed,
        arguments.seconds,
        arguments.sequences,
        shrink=arguments.shrink,
    )
    print(
        f"backend {report.backend}, seed {report.seed}: {report.sequences:,} sequences, "
        f"{report.steps:,} steps, {report.calls:,} calls, {report.seconds:.0f} s; nothing found"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(dataclasses.asdict(report)) + "\n")
    return 0


def fuzz(
    backend: str,
    first_seed: int,
    seconds: float,
    sequences: int | None = None,
    *,
    shrink: bool = False,
) -> Report:
    """Seeds from ``first_seed`` on, so many sequences each. Raises what hypothesis found."""
    if _EMULATED in os.environ:
        from tests.emulator import plugin  # noqa: F401  before fusedclip
    from hypothesis import HealthCheck, Phase, seed, settings
    from hypothesis.stateful import run_state_machine_as_test

    from tests.fuzz.machine import Clipping

    small = {} if backend != "cuda" else {"large": (3001, 700), "grids": _GRIDS}
    start = time.perf_counter()
    done = 0
    while (sequences is None and time.perf_counter() - start < seconds) or done < (sequences or 0):
        own_seed = first_seed + done // _EXAMPLES_EACH
        count = min(_EXAMPLES_EACH, (sequences or sys.maxsize) - done)
        machine = type("Clipping", (Clipping,), {"backend": backend, **small})
        run_state_machine_as_test(
            seed(own_seed)(machine),
            settings=settings(
                max_examples=count,
                stateful_step_count=_STEPS_EACH,
                deadline=None,
                report_multiple_bugs=False,
                database=None,
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        done += count
    took = time.perf_counter() - start
    return Report(backend, first_seed, took, done, Clipping.steps, Clipping.calls)


def _inside_the_emulator(arguments: Sequence[str]) -> int:
    from tests.emulator import build

    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *arguments]
    environment = build.environment(build.build(), FUSEDCLIP_CUDA_LAYOUT=_GRIDS[0])
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
