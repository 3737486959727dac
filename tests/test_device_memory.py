"""The memory that GPU kernels are handed: what is kept, where it comes from, what is let go.

On the CPU, with the device's answers pretended; tests/test_gpu.py asks a real one.
"""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fusedclip.backends import device_memory
from fusedclip.backends.device_memory import DeviceMemory, outside_pools

_CPU = torch.device("cpu")


class _Key:
    """As a table's is: equal only to itself."""


def _table(memory: DeviceMemory, key: object, stream: int = 0) -> Tensor:
    return memory.table(_CPU, stream, key, lambda: torch.empty(4), lambda table: table.fill_(1.0))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "capturing", lambda device: True)


def test_memory_is_kept_for_a_stream() -> None:
    memory = DeviceMemory(zeroed=True)
    first = memory.scratch(_CPU, 0, 100)
    assert first.numel() == 100 and not first.any()
    assert memory.scratch(_CPU, 0, 50) is first
    assert memory.scratch(_CPU, 1, 50) is not first
    assert memory.scratch(_CPU, 0, 200) is not first
    key = _Key()
    table = _table(memory, key)
    assert (table == 1).all()
    assert _table(memory, key) is table and _table(memory, _Key()) is not table


@pytest.mark.usefixtures("captured")
def test_a_captured_launch_has_memory_of_its_own() -> None:
    memory = DeviceMemory()
    key = _Key()
    assert memory.scratch(_CPU, 0, 8) is not memory.scratch(_CPU, 0, 8)
    assert _table(memory, key) is not _table(memory, key)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("copied", [False, True], ids=["written by launches", "copied"])
def test_keys_of_captured_tables(copied: bool) -> None:
    """They are let go where a replay needs no memory of the host, and kept once where it does."""
    memory = DeviceMemory(copied=copied)
    key = _Key()
    for _ in range(3):
        _table(memory, key)
    assert len(memory._replayed) == copied
    alive = weakref.ref(key)
    del key
    gc.collect()
    assert (alive() is not None) == copied


def test_what_is_kept_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools are opened for a thread; the current stream waits, and the allocator is told of it."""
    seen: list[object] = []
    made = SimpleNamespace(record_stream=lambda stream: seen.append(("recorded", stream)))
    current = SimpleNamespace(wait_stream=lambda stream: seen.append(("waits for", stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    threads: list[int] = []

    def make() -> Tensor:
        threads.append(threading.get_ident())
        return made  # type: ignore[return-value]

    assert outside_pools(torch.device("cuda", 0), make) is made  # type: ignore[comparison-overlap]
    assert threads != [threading.get_ident()] and len(threads) == 1
    assert seen == [("waits for", "default"), ("recorded", current)]
    assert outside_pools(_CPU, make) is made  # type: ignore[comparison-overlap]
    assert threads[1] == threading.get_ident()  # the twin: there are no pools


def test_a_failure_to_allocate_is_the_callers() -> None:
    def make() -> Tensor:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        outside_pools(torch.device("cuda", 0), make)
