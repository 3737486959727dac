"""Start a few processes of one torch.distributed job, run all cases in them, and collect.

Starting costs seconds and a case milliseconds, so every test of a world size shares one job. A rank
that fails writes its traceback; the others then fail by the group's timeout.
"""

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMEOUT = datetime.timedelta(seconds=60)
_ROOT = Path(__file__).parents[2]

Case = Callable[[], None]


def run_job(module: str, world_size: int, timeout: float = 200.0) -> dict[str, list[str]]:
    """Run ``module.CASES[world_size]`` on each rank: case → [outcome of each rank, "" is good]."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__, module, str(rank),
                 str(world_size), folder],
                cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world_size)
        ]  # fmt: skip
        try:
            for process in processes:
                process.wait(timeout)
        finally:
            for process in processes:
                process.kill()
        reports = [_report(out / f"{rank}.json") for rank in range(world_size)]
    cases = list(dict.fromkeys(case for report in reports for case in report))
    return {case: [report.get(case, "did not run") for report in reports] for case in cases}


def failures(outcomes: Sequence[str]) -> str:
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text)


def _report(path: Path) -> dict[str, str]:
    report: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return report


def _main(module: str, rank: int, world_size: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    cases: dict[str, Case] = importlib.import_module(module).CASES[world_size]
    report: dict[str, str] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments: Any = sys.argv[1:]
    _main(arguments[0], int(arguments[1]), int(arguments[2]), arguments[3])
