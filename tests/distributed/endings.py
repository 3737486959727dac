"""Very many jobs that end right after a clip: ``python -m tests.distributed.endings``.

torch's gloo thread may still hold what the clip sent while the interpreter ends; if it needs the
GIL then, the process dies of SIGABRT. That takes a thread that comes late. So two endless loops run
beside the jobs, and before the last clip gloo's threads get the lowest priority.

A rank is a fork of a process that has imported everything; it ends as any script does.
"""

import argparse
import gc
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

import fusedclip

WORLD_SIZE = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.distributed.endings", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="processes that start jobs")
    parser.add_argument("--busy", type=int, default=2, help="endless loops beside the jobs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args(argv)
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    busy = [sys.executable, "-c", loop]
    loops = [subprocess.Popen(busy) for _ in range(arguments.busy)]
    starters = []
    for _ in range(arguments.at_once):
        pid = os.fork()
        if pid == 0:
            return _jobs(arguments.jobs // arguments.at_once, arguments.kinds)
        starters.append(pid)
    try:
        return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in starters)
    finally:
        for process in loops:
            process.kill()
            process.wait()


def _jobs(jobs: int, kinds: Sequence[str]) -> int:
    """Run them one after the other, the kinds in turn. A rank returns from here too, as it ends."""
    torch.set_num_threads(1)
    gc.freeze()  # a rank that ends would otherwise copy nearly every page
    folder = tempfile.mkdtemp()
    started: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for job in range(jobs):
        kind = kinds[job % len(kinds)]
        logs = [Path(folder, f"{job}-{rank}.txt") for rank in range(WORLD_SIZE)]
        pids = []
        for rank, log in enumerate(logs):
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
                return _rank(kind, rank, f"file://{folder}/{job}.store")
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        started[kind] += 1
        failed[kind] += any(codes)
        for rank, (code, log) in enumerate(zip(codes, logs, strict=True)):
            if code:
                print(
                    f"job {job} ({kind}), rank {rank} ended with {code}: {log.read_text()[-300:]}"
                )
    shutil.rmtree(folder)
    counts = ", ".join(f"{failed[kind]} of {started[kind]} {kind}" for kind in started)
    print(f"{failed.total()} of {jobs} jobs did not end cleanly: {counts}", flush=True)
    return 1 if failed.total() else 0


def _rank(kind: str, rank: int, store: str) -> int:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    KINDS[kind](init_device_mesh("cpu", (WORLD_SIZE,)))
    return 0


def _late_threads() -> None:
    """From now on all threads but this one get what the others leave; nice 19 is not low enough."""
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def _plain_gradients(mesh: DeviceMesh) -> None:
    p = _with_gradient(torch.ones(3))
    _late_threads()
    fusedclip.clip_([p], 1.0, process_group=mesh.get_group())


def _infinity_norm(mesh: DeviceMesh) -> None:
    """The all-reduce that flags a NaN."""
    p = _with_gradient(torch.ones(3))
    _late_threads()
    fusedclip.clip_([p], 1.0, math.inf, process_group=mesh.get_group())


def _dtensors(mesh: DeviceMesh) -> None:
    p = _with_gradient(DTensor.from_local(torch.ones(3), mesh, [Shard(0)]))
    _late_threads()
    fusedclip.clip_([p], 1.0)


def _pending_sums(mesh: DeviceMesh) -> None:
    """Summands, which a reduce-scatter adds up."""
    p = _with_gradient(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    _late_threads()
    fusedclip.clip_([p], 1.0)


def _refused(mesh: DeviceMesh) -> None:
    """The ranks tell each other what they found, and raise."""
    p = _with_gradient(torch.full((3,), math.nan))
    _late_threads()
    try:
        fusedclip.clip_([p], 1.0, nonfinite="error", process_group=mesh.get_group())
    except fusedclip.NonfiniteGradientError:
        return
    raise AssertionError("a NaN was not noticed")


def _fsdp2(mesh: DeviceMesh) -> None:
    """As in the example, with the threads as they are: FSDP has transfers of its own."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        fusedclip.clip_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


def _with_gradient(grad: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    return p


KINDS: dict[str, Callable[[DeviceMesh], None]] = {
    "plain": _plain_gradients,
    "infinity": _infinity_norm,
    "dtensors": _dtensors,
    "partial": _pending_sums,
    "refused": _refused,
    "fsdp2": _fsdp2,
}

if __name__ == "__main__":
    sys.exit(main())
