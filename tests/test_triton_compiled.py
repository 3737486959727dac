"""The Triton kernels compiled for real GPUs, as the backend asks for them, and read as assembly."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fusedclip.triton_kernels import interpreted, launch
from triton.compiler import ASTSource

from fusedclip.backends import triton as backend
from fusedclip.backends import triton_gradients
from tests.helpers import FLOAT_DTYPES
from tests.pretended_gpu import TARGETS, PretendedGpu, pretended_gpu

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module", params=TARGETS)
def gpu(request: pytest.FixtureRequest) -> Iterator[PretendedGpu]:
    """After every call that the backend offers: all its kernels are compiled."""
    with pytest.MonkeyPatch.context() as patch, pretended_gpu(TARGETS[request.param], patch) as gpu:
        (grads,), _ = triton_gradients.take(
            [(i, torch.randn(100 + i).to(dtype)) for i, dtype in enumerate(FLOAT_DTYPES)], True
        )
        one = torch.ones(1, dtype=torch.float64)
        for infinity in (False, True):
            backend.clip_(grads, 1.0, infinity=infinity, nonfinite="propagate")
            backend.measure(grads, None, infinity=infinity, out=one)
            with pytest.MonkeyPatch.context() as long:
                long.setattr(launch, "LONG_BYTES", 0)  # in a launch for each phase
                backend.clip_(grads, 1.0, infinity=infinity, nonfinite="propagate")
        backend.scale_(grads, None, one)
        yield gpu


def _text(kernel: Any) -> str:
    return str(kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"])


def _vector_accesses(gpu: PretendedGpu, text: str) -> tuple[int, int]:
    """128-bit loads and stores of global memory."""
    if gpu.target.backend == "cuda":
        load, store = r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", r"st\.global\.v[24]\.b(32|64)"
    else:
        load, store = (
            r"\b(global|buffer)_load_(dwordx4|b128)",
            r"\b(global|buffer)_store_(dwordx4|b128)",
        )
    return len(re.findall(load, text)), len(re.findall(store, text))


def _whole(gpu: PretendedGpu) -> list[Any]:
    """The kernels of one launch: measure, wait for all, finish. Only CUDA's devices have them."""
    return [kernel for (*_, phases), kernel in _with_phases(gpu) if phases == (True, True)]


def _with_phases(gpu: PretendedGpu) -> list[tuple[tuple[Any, ...], Any]]:
    """((name, device, (measures, finishes) or none of the kernel that scales alone), kernel)."""
    return [
        ((name, index, tuple(constants[1:3]) if name == "_clip_kernel" else ()), kernel)
        for (name, index, constants), kernel in launch._compiled.items()
    ]


def test_one_specialisation_for_each_kind_of_norm(gpu: PretendedGpu) -> None:
    cooperative = 2 * (gpu.target.backend == "cuda")
    phases = 2 * 2
    assert len(gpu.kernels) == cooperative + phases + 1


def test_accesses_are_of_128_bits(gpu: PretendedGpu) -> None:
    """A tile is ROWS vectors of each type, for measuring and for scaling."""
    enough = len(FLOAT_DTYPES) * launch.ROWS
    loads, stores = zip(*(_vector_accesses(gpu, _text(k)) for k in gpu.kernels), strict=True)
    if gpu.target.backend == "cuda":
        for ((_, _, phases), _), load, store in zip(_with_phases(gpu), loads, stores, strict=True):
            measures, finishes = phases or (False, True)
            # A kernel that measures loads alone as well; the few less are what a chunk shares.
            assert load >= enough * (measures + finishes) - 4 * measures, phases
            assert store == 0 if not finishes else store >= enough, phases
    else:
        assert max(loads) >= enough and max(stores) == enough


@triton.jit
def _double_kernel(address: tl.int64, ALIGNED: tl.constexpr):
    grad_ptr = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    at = tl.arange(0, 1024)
    tl.store(grad_ptr + at, tl.load(grad_ptr + at) * 2.0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_count_sees_scalar_accesses(target: str) -> None:
    """The twin: without the promise of alignment there is no 128-bit access."""
    gpu = PretendedGpu(TARGETS[target])
    counts = []
    for aligned in (False, True):
        signature = {"address": "i64", "ALIGNED": "constexpr"}
        source = ASTSource(_double_kernel, signature, {"ALIGNED": aligned})
        options = {"num_warps": 4, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=gpu.target, options=options)
        counts.append(_vector_accesses(gpu, _text(compiled)))
    assert counts[0] == (0, 0)
    assert min(counts[1]) > 0


def test_nothing_is_spilled(gpu: PretendedGpu, tmp_path: Path) -> None:
    for kernel in gpu.kernels:
        if gpu.target.backend == "cuda":
            registers, stack = _resources(kernel.asm["cubin"], tmp_path)
            assert registers <= launch.MAX_REGISTERS
            assert stack == 0
        else:
            spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", _text(kernel))
            private = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", _text(kernel))
            assert len(spills) == 2 and private
            assert {*spills, *private} == {"0"}


def _resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = str(_CUOBJDUMP) if _CUOBJDUMP.exists() else shutil.which("cuobjdump")
    assert tool is not None
    command = [tool, "-res-usage", str(folder / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def test_spills_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a quarter of the registers is too few, and the check says so."""
    monkeypatch.setattr(launch, "MAX_REGISTERS", 32)
    with pretended_gpu(TARGETS["sm_90"], monkeypatch) as gpu:
        (grads,), _ = triton_gradients.take([(0, torch.randn(100))], True)
        backend.clip_(grads, 1.0, infinity=False, nonfinite="propagate")
        (kernel,) = gpu.kernels
        assert _resources(kernel.asm["cubin"], tmp_path)[1] > 0


def test_no_flushing_of_subnormals_and_no_float_atomics(gpu: PretendedGpu) -> None:
    for kernel in gpu.kernels:
        text = _text(kernel)
        assert ".ftz" not in text
        assert not re.search(r"(atom|red)\.\S*\.f(16|32|64)|atomic_\w*f(32|64)", text)


def test_the_decision_is_in_exact_fp64(gpu: PretendedGpu) -> None:
    """Root and quotient are rounded to the nearest, and torch's 1e-6 is not one of fp32."""
    if gpu.target.backend != "cuda":
        pytest.skip("reads PTX")
    epsilon = f"0d{torch.tensor(1e-6, dtype=torch.float64).view(torch.int64).item():016X}"
    for kernel in gpu.kernels:
        text = _text(kernel)
        assert "approx" not in text
    finishing = [k for (_, _, phases), k in _with_phases(gpu) if phases and phases[1]]
    for kernel in finishing:
        assert epsilon in _text(kernel) and "div.rn.f64" in _text(kernel)
    roots = sum("sqrt.rn.f64" in _text(kernel) for kernel in gpu.kernels)
    assert roots == len(finishing) / 2  # those of the L2 norm


def test_the_barrier(gpu: PretendedGpu) -> None:
    """CUDA: the grid is launched cooperatively, arrives with release and waits with acquire.
    Elsewhere there is no barrier, and nothing that waits."""
    for kernel in gpu.kernels:
        text = _text(kernel)
        waits = kernel in _whole(gpu)
        if gpu.target.backend == "cuda":
            assert kernel.metadata.launch_cooperative_grid == waits
            assert ("atom.global.gpu.acq_rel.add.u64" in text) == waits
            assert bool(re.search(r"(ld|atom)\.global\.gpu\.acquire", text)) == waits
        else:
            assert not kernel.metadata.launch_cooperative_grid
            assert "atomic" not in text


def test_measuring_loops_exchange_nothing(gpu: PretendedGpu) -> None:
    """Threads add up for themselves; they meet once a chunk. A tile that Triton lays out so that
    the threads of a warp share a column would have them meet for each tile."""
    if gpu.target.backend != "cuda":
        pytest.skip("reads PTX")
    for kernel in gpu.kernels:
        bodies = [b for b in _innermost_loops(_text(kernel)) if re.search(r"global\.v[24]\.b", b)]
        assert len(bodies) >= len(FLOAT_DTYPES)
        assert not any(re.search(r"bar\.sync|shfl|redux|\.shared", body) for body in bodies)


def test_threads_meet_after_the_branches_of_the_dtypes(gpu: PretendedGpu) -> None:
    """However many dtypes there are, the loop over chunks has two sums over the warps and a maximum
    (one maximum, of the infinity norm): each is registers for Triton 3.6 and 3.7 to keep."""
    if gpu.target.backend != "cuda":
        pytest.skip("reads PTX")
    maximum, sums = sorted(
        len(re.findall(r"ld\.shared", _text(kernel)[: _text(kernel).index("atom.global")]))
        for kernel in _whole(gpu)
    )
    assert maximum <= 2 and sums <= 6  # what the warps found, and the result where all read it


def _innermost_loops(ptx: str) -> list[str]:
    """The text between a backward branch and its label, where no other such loop is inside."""
    lines = ptx.splitlines()
    label_at = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L__BB\w+):", line))}
    spans = [
        (label_at[m[1]], i)
        for i, line in enumerate(lines)
        if (m := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)) and label_at[m[1]] < i
    ]
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    return ["\n".join(lines[begin:end]) for begin, end in inner]
