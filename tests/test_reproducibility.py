"""The same bits for any thread count, offset and instruction set; safe from threads and forks."""

import math
import os
import sys
import threading

import pytest
import torch

import fusedclip
from tests import forked
from tests.helpers import FLOAT_DTYPES, clones, exact_norm, parameters, same_bits


def _list(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (1_000_003, 65_536, 17, 300_001, 1)
    return parameters(
        *[
            torch.randn(size, generator=generator).to(dtype)
            for size in sizes
            for dtype in FLOAT_DTYPES
        ]
    )


@pytest.mark.parametrize("order", [2.0, math.inf], ids=str)
def test_bits_do_not_depend_on_threads(order: float) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        params = _list()
        norm = fusedclip.clip_(params, 1.0, order, backend="cpu")
        results.append([norm, *(p.grad for p in params)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_do_not_depend_on_the_address() -> None:
    values = torch.randn(100_003)
    norms = []
    for offset in range(5):
        shifted = torch.empty(100_010)[offset : offset + 100_003].copy_(values)
        norms.append(fusedclip.clip_(parameters(shifted), math.inf, backend="cpu"))
    assert all(same_bits(norms[0], norm) for norm in norms[1:])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("numel", [65_472, 65_535, 65_536, 65_537, 131_040, 131_071])
@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_shares_end_where_tensors_end(threads: int, numel: int, count: int) -> None:
    """Guards behind each gradient: a share that ran past its tensor would touch them."""
    torch.set_num_threads(threads)
    buffer = torch.full((count, numel + 64), 1e10)
    buffer[:, :numel] = torch.randn(count, numel)
    params = parameters(*buffer[:, :numel].unbind())
    expected = torch.linalg.vector_norm(buffer[:, :numel].double()).item()
    norm = fusedclip.clip_(params, 0.5 * expected, backend="cpu")
    assert norm.item() == pytest.approx(expected, rel=5e-7)
    assert (buffer[:, numel:] == 1e10).all()
    after = torch.linalg.vector_norm(buffer[:, :numel].double()).item()
    assert after == pytest.approx(0.5 * expected, rel=1e-6)


_ISA_SCRIPT = """
import torch, fusedclip
from fusedclip import _C
torch.manual_seed(0)
values = [torch.randn(70_001).to(d) for d in
          (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
params = [torch.nn.Parameter(torch.zeros_like(v)) for v in values]
for p, v in zip(params, values):
    p.grad = v
norm = fusedclip.clip_(params, 1.0, backend="cpu")
total = sum(p.grad.double().abs().sum().item() for p in params)
print(_C.cpu_isa(), norm.item().hex(), total.hex())
"""


def test_bits_do_not_depend_on_the_instruction_set() -> None:
    outputs = {}
    for isa in ("baseline", "avx2", "avx512"):
        run = forked.python("-c", _ISA_SCRIPT, env={**os.environ, "FUSEDCLIP_CPU_ISA": isa})
        if run.returncode and isa != "baseline":
            assert isa in run.stderr  # a machine without it says so
            continue
        assert run.returncode == 0, run.stderr
        name, *numbers = run.stdout.split()
        assert name == isa
        outputs[isa] = numbers
    assert len({tuple(numbers) for numbers in outputs.values()}) == 1, outputs


def test_concurrent_calls() -> None:
    """Several Python threads clip lists of their own at once; the GIL is released meanwhile."""
    expected = _list()
    norm = fusedclip.clip_(expected, 1.0, backend="cpu")
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            params = _list()
            if not same_bits(fusedclip.clip_(params, 1.0, backend="cpu"), norm):
                failures.append("norm")
            if not all(same_bits(a.grad, b.grad) for a, b in zip(params, expected, strict=True)):
                failures.append("gradients")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


_FORK_SCRIPT = """
import os, sys, torch, fusedclip
p = torch.nn.Parameter(torch.zeros(4_000_000))
p.grad = torch.ones(4_000_000)
parent = fusedclip.clip_([p], 1e9, backend="cpu")
child = os.fork()
if child == 0:
    norm = fusedclip.clip_([p], 1.0, backend="cpu")
    os._exit(0 if torch.equal(norm, parent) else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_after_fork() -> None:
    """The child of a process that already used several threads clips with several, of its own."""
    run = forked.python("-W", "ignore", "-c", _FORK_SCRIPT)
    assert run.returncode == 0, run.stderr


def test_repeated_calls_allocate_nothing_lasting() -> None:
    params = parameters(*torch.randn(300, 16).unbind())
    before = clones(params)
    references = [sys.getrefcount(p.grad) for p in params[:5]]
    for _ in range(1000):
        fusedclip.clip_(params, 1e9, backend="cpu")
    assert [sys.getrefcount(p.grad) for p in params[:5]] == references
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))
    assert exact_norm(before) > 0
