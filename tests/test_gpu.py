"""On a real GPU: streams, graphs, synchronisation, room for other kernels, sizes.

Each test has a twin that runs without one; it is named in the docstring. The arithmetic is tested
by the common suite, which `make gpu` runs on CUDA tensors too.
"""

import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip.backends import cuda, triton
from tests.helpers import FLOAT_DTYPES, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(120),
]

BACKENDS = [name for name in ("cuda", "triton") if name in fusedclip.available_backends()]


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> str:
    reason = fusedclip.available_backends()[request.param]
    if reason != "ok":
        pytest.fail(f"backend {request.param} must run on a machine with a GPU: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


def _parameters(*grads: Tensor) -> list[nn.Parameter]:
    made = []
    for grad in grads:
        made.append(nn.Parameter(torch.empty_like(grad)))
        made[-1].grad = grad
    return made


def test_a_monitor_never_waits(kernels: str) -> None:
    """The twin: test_monitor.py::test_update_never_waits_for_a_device."""
    params = _mixed()
    clipper = fusedclip.Clipper(params, 1.0, monitor=True, backend=kernels)
    clipper.clip_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            torch.cuda._sleep(1_000_000)  # the device is behind
            clipper.clip_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert clipper.monitor is not None
    summary = clipper.monitor.summary()
    assert summary.steps == 21 and summary.last_norm == clipper.last_norm.item()
    norms = [p.grad.double().norm().item() for p in params]
    best = max(range(len(params)), key=norms.__getitem__)
    assert summary.top[0].name == f"parameters[{best}]"


def _mixed(numel: int = 100_000) -> list[nn.Parameter]:
    return _parameters(*(torch.randn(numel).to(d) for d in FLOAT_DTYPES))


def _exact_norm(params: list[nn.Parameter]) -> float:
    return float(sum(p.grad.double().square().sum() for p in params).sqrt())


def _kernels_of(call: Callable[[], object]) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_one_launch_and_no_copy(kernels: str) -> None:
    """Twin: tests/emulator/inside.py::test_one_launch_a_call."""
    params = _mixed()
    for max_norm in (1e9, 0.1):
        fusedclip.clip_(params, max_norm, backend=kernels)
        names = _kernels_of(lambda limit=max_norm: fusedclip.clip_(params, limit, backend=kernels))
        assert len(names) == 1, names


def test_never_waits_for_the_device(kernels: str) -> None:
    """Twin: the emulator has no device to wait for; the code path is the same."""
    params = _mixed()
    limit = torch.tensor(0.5)
    fusedclip.clip_(params, 1.0, backend=kernels)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for max_norm in (math.inf, 1e9, 0.1, limit):
            for nonfinite in ("propagate", "zero"):
                fusedclip.clip_(params, max_norm, nonfinite=nonfinite, backend=kernels)
        fusedclip.clip_grad_norm_(params, 0.1)
        fusedclip.get_tensor_norms([p.grad for p in params])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_allocates_nothing_but_the_norm(kernels: str) -> None:
    """Twin: tests/test_resources.py, for the CPU."""
    params = _mixed(1_000_000)
    fusedclip.clip_(params, 0.1, backend=kernels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fusedclip.clip_(params, 0.1, backend=kernels)
    assert torch.cuda.max_memory_allocated() - before <= 1024


@pytest.mark.parametrize("count", [4, 2000], ids=["short", "long"])
def test_a_captured_graph_follows_the_values(kernels: str, count: int) -> None:
    """Twin: tests/emulator/inside.py::test_a_long_table_is_written_once…, without the capture."""
    params = _parameters(*(torch.randn(50) for _ in range(count)))
    fusedclip.clip_(params, 1.0, backend=kernels)  # compiled and loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fusedclip.clip_(params, 1.0, backend=kernels)
    for magnitude in (100.0, 1e-3):
        for p in params:
            p.grad.normal_().mul_(magnitude)
        # A call in between must not disturb what the graph holds.
        fusedclip.clip_(_mixed(), 1.0, backend=kernels)
        exact = _exact_norm(params)
        graph.replay()
        assert norm.item() == pytest.approx(exact, rel=5e-7)
        assert _exact_norm(params) == pytest.approx(min(exact, 1.0), rel=1e-5)


def test_what_is_kept_lies_in_no_pool(kernels: str) -> None:
    """Of a clip while somebody else's pool is open, as torch.compile's CUDA graphs have it while
    they warm up. Twin: tests/test_device_memory.py."""
    params = _parameters(*(torch.randn(50) for _ in range(2000)))
    pool, stream = torch.cuda.MemPool(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
        exact = _exact_norm(params)
        norm = fusedclip.clip_(params, 1.0, backend=kernels)
    assert norm.item() == pytest.approx(exact, rel=5e-7)
    memory = {"cuda": cuda, "triton": triton}[kernels]._memory
    kept = [t for (_, handle), t in memory._scratch.items() if handle == stream.cuda_stream]
    kept += [t for (_, handle), (_, t) in memory._table.items() if handle == stream.cuda_stream]
    assert len(kept) == 2
    for segment in torch.cuda.memory_snapshot(pool.id):
        begin, end = segment["address"], segment["address"] + segment["total_size"]
        assert not any(begin <= t.data_ptr() < end for t in kept)


def test_a_launch_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, and where the device refuses the cooperative grid: the same bits as in one launch.
    Twin: tests/emulator/inside.py::test_a_launch_for_each_phase."""
    if fusedclip.available_backends()["cuda"] != "ok":
        pytest.skip(f"backend cuda: {fusedclip.available_backends()['cuda']}")
    results = []
    too_many = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    for blocks, launches in ((16, 1), (16, 2), (too_many, 2), (too_many, 1)):
        monkeypatch.setenv("FUSEDCLIP_CUDA_LAYOUT", f"256,{blocks},4096,0,{launches}")
        torch.manual_seed(0)
        params = _mixed(3_000_000)
        norm = fusedclip.clip_(params, 1.0, backend="cuda")
        results.append([norm, *(p.grad for p in params)])
    for one, other in (results[:2], results[2:]):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def test_under_torch_compile(kernels: str) -> None:
    """Twin: tests/test_compile.py."""
    params = _mixed(1000)
    exact = _exact_norm(params)

    @torch.compile(fullgraph=True)
    def step(scale: Tensor) -> Tensor:
        return fusedclip.clip_(params, 1.0, backend=kernels) * scale

    assert step(torch.tensor(2.0)).item() == pytest.approx(2 * exact, rel=5e-7)
    assert _exact_norm(params) == pytest.approx(1.0, rel=1e-2)


def test_on_the_current_stream(kernels: str) -> None:
    """The clip comes after what was queued there before, however long that takes."""
    params = _mixed()
    exact = _exact_norm(params)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for p in params:
            p.grad.mul_(2.0)
        norm = fusedclip.clip_(params, 1e9, backend=kernels)
    stream.synchronize()
    assert norm.item() == pytest.approx(2 * exact, rel=5e-7)


def test_threads_and_streams_at_once(kernels: str) -> None:
    """Twin: tests/emulator/inside.py::test_threads_at_once."""
    failures: list[str] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.device("cuda"):
            for count in (4, 1500):
                grads = [torch.randn(40) * (seed + 1) for _ in range(count)]
                params = _parameters(*grads)
                exact = _exact_norm(params)
                for _ in range(20):
                    norm = fusedclip.clip_(params, 1e9, backend=kernels).item()
                    if norm != pytest.approx(exact, rel=5e-7):
                        failures.append(f"thread {seed}, {count} tensors: {norm}, not {exact}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_beside_kernels_that_hold_multiprocessors(kernels: str) -> None:
    """The grid's blocks find room while other kernels spin: communication waits like that.

    Twin: tests/test_cubins.py::test_a_block_leaves_half_of_its_multiprocessor.
    """
    params = _mixed(1_000_000)
    # torch hands out 32 streams in turn: more sleepers than half of them would share streams. Those
    # of a high priority are 32 others, so the clip's is none of a sleeper's.
    sleeping = [torch.cuda.Stream() for _ in range(16)]
    clipping = torch.cuda.Stream(priority=-1)
    streams = {stream.cuda_stream for stream in (*sleeping, clipping)}
    assert len(streams) == 17, "streams are shared: the clip would wait for a sleeper"
    with torch.cuda.stream(clipping):
        fusedclip.clip_(params, 1.0, backend=kernels)  # its scratch is of that stream
    torch.cuda.synchronize()
    spun = []
    for stream in sleeping:  # each holds a multiprocessor's block slot for two seconds or more
        with torch.cuda.stream(stream):
            torch.cuda._sleep(4_000_000_000)
            spun.append(torch.cuda.Event())
            spun[-1].record()
    clipped = torch.cuda.Event()
    with torch.cuda.stream(clipping):
        fusedclip.clip_(params, 1.0, backend=kernels)
        clipped.record()
    clipped.synchronize()
    assert not any(event.query() for event in spun), "the clip waited for the other kernels"


def test_bits_are_the_same_from_run_to_run(kernels: str) -> None:
    """Twin: tests/emulator/inside.py::test_bits_do_not_depend_on_the_schedule."""
    results = []
    for _ in range(5):
        torch.manual_seed(0)
        params = _mixed(1_000_003)
        results.append([fusedclip.clip_(params, 1.0, backend=kernels), *(p.grad for p in params)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_twenty_thousand_tensors(kernels: str) -> None:
    """Twin: tests/test_semantics.py::test_twenty_thousand_tensors, over the emulator."""
    params = _parameters(*torch.randn(20_000, 3).unbind())
    exact = _exact_norm(params)
    norm = fusedclip.clip_(params, 1.0, backend=kernels)
    assert norm.item() == pytest.approx(exact, rel=5e-7)
    assert _exact_norm(params) == pytest.approx(1.0, rel=1e-5)


def test_three_billion_elements_in_one_tensor(kernels: str) -> None:
    """Past 2^31 elements. Twin: none has the memory; offsets are 64 bits wide, see kernels.cuh."""
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free GPU memory")
    numel = 3_000_000_000
    grad = torch.full((numel,), 0.5, dtype=torch.bfloat16)
    grad[-1] = 100.0
    p = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    p.data, p.grad = grad, grad
    exact = math.sqrt((numel - 1) * 0.25 + 100.0**2)
    norm = fusedclip.clip_([p], exact / 2, backend=kernels)
    assert norm.item() == pytest.approx(exact, rel=5e-7)
    assert (grad[0].item(), grad[numel // 2].item(), grad[-1].item()) == (0.25, 0.25, 50.0)


def test_several_devices_in_one_list() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; twin: CPU and GPU in one list, below")
    params = _parameters(torch.randn(1000), torch.randn(1000, device="cuda:1"))
    exact = math.hypot(*(p.grad.double().norm().item() for p in params))
    norm = fusedclip.clip_(params, 1.0)
    assert norm.device == params[0].device
    assert norm.item() == pytest.approx(exact, rel=5e-7)


def test_cpu_and_gpu_in_one_list() -> None:
    params = _parameters(torch.full((4,), 2.0), torch.full((9,), 1.0, device="cpu"))
    norm = fusedclip.clip_(params, 1.0)
    assert norm.device.type == "cuda"
    assert norm.item() == 5.0
    assert params[0].grad[0].item() == pytest.approx(0.4, rel=1e-5)
    assert params[1].grad[0].item() == pytest.approx(0.2, rel=1e-5)


def test_an_architecture_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: tests/test_cuda_selection.py, with architectures made up."""
    monkeypatch.setattr(cuda, "_supported", lambda capability, architectures: False)
    cuda.problem_of.cache_clear()
    params = _mixed(10)
    try:
        with pytest.raises((RuntimeError, ValueError), match="FUSEDCLIP_CUDA_ARCHS"):
            fusedclip.clip_(params, 1.0, backend="cuda")
    finally:
        cuda.problem_of.cache_clear()


def test_out_of_memory_leaves_the_gradients(kernels: str) -> None:
    """Scratch that cannot be had. Twin: a failed launch, in tests/emulator/inside.py."""
    params = _mixed(100)
    before = [p.grad.clone() for p in params]
    stream = torch.cuda.Stream()  # has no scratch yet
    with torch.cuda.stream(stream), pytest.MonkeyPatch.context() as patch:

        def no_memory(*size: object, **options: object) -> Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        patch.setattr(torch, "empty", no_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            fusedclip.clip_(params, 0.1, backend=kernels)
    stream.synchronize()
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))
    assert fusedclip.clip_(params, 0.1, backend=kernels) > 0
