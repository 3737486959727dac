"""Start a few processes of one torch.distributed job, run all cases in them, and collect.

Starting costs seconds and a case milliseconds, so every test of a world size shares one job, whose
ranks are forks of a process that has imported everything. A rank that fails writes its traceback;
the others then fail by the group's timeout.
"""

import datetime
import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tests import forked

TIMEOUT = datetime.timedelta(seconds=60)

Case = Callable[[], None]


def run_job(module: str, world_size: int) -> dict[str, list[str]]:
    """Run ``module.CASES[world_size]`` on each rank: case → [outcome of each rank, "" is good]."""
    return run_jobs(module, [world_size])[world_size]


def run_jobs(module: str, world_sizes: Sequence[int]) -> dict[int, dict[str, list[str]]]:
    """A job of each size, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = map(str, world_sizes)
        done = forked.python("-W", "ignore", "-m", __name__, module, folder, *sizes)
        print(done.stdout, done.stderr)  # pytest shows it beside a failure
        return {size: _outcomes(Path(folder, str(size)), size) for size in world_sizes}


def _outcomes(folder: Path, world_size: int) -> dict[str, list[str]]:
    reports = [_report(folder / f"{rank}.json") for rank in range(world_size)]
    cases = list(dict.fromkeys(case for report in reports for case in report))
    return {case: [report.get(case, "did not run") for report in reports] for case in cases}


def failures(outcomes: Sequence[str]) -> str:
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text)


def _report(path: Path) -> dict[str, str]:
    report: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return report


def _main(module: str, folder: Path, world_sizes: Sequence[int]) -> None:
    """Fork the ranks and wait for them. A rank returns from here too, and ends as any script."""
    torch.set_num_threads(1)
    all_cases: dict[int, dict[str, Case]] = importlib.import_module(module).CASES
    gc.freeze()  # a rank that ends would otherwise copy nearly every page
    for size in world_sizes:
        (folder / str(size)).mkdir()
        for rank in range(size):
            if os.fork() == 0:
                _rank(all_cases[size], rank, size, folder / str(size))
                return
        for _ in range(size):
            os.wait()


def _rank(cases: dict[str, Case], rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    report: dict[str, str] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
