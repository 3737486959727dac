"""When the Triton backend can run, what it says when it cannot, and when "auto" takes it."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from fusedclip.triton_kernels import interpreted
from triton.runtime import driver

from fusedclip.backends import cuda, select
from fusedclip.backends import triton as backend
from tests import forked

pytestmark = pytest.mark.skipif(interpreted(), reason="about GPUs")


class _NoCompiler:
    def get_current_target(self) -> None:
        raise RuntimeError("Failed to find C compiler")


def _gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    patch.setattr(driver, "_active", type("Driver", (), {"get_current_target": lambda self: 1})())


def _old_triton(patch: pytest.MonkeyPatch) -> None:
    _gpu(patch)
    patch.setattr(triton, "__version__", "3.5.1")


def _no_compiler(patch: pytest.MonkeyPatch) -> None:
    _gpu(patch)
    patch.setattr(driver, "_active", _NoCompiler())


def _no_triton(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(importlib.util, "find_spec", lambda name: None)


CASES: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], str]] = {
    "not installed": (_no_triton, "Triton is not installed .*; pip install triton"),
    "no gpu": (lambda p: p.setattr(torch.accelerator, "is_available", lambda: False), "no GPU"),
    "too old": (_old_triton, r"Triton 3\.5\.1 is too old; 3\.6 or later is needed"),
    "old gpu": (lambda p: _gpu(p, (7, 5)), r"cuda:0 is of compute capability 7\.5; 8\.0 or later"),
    "no compiler": (_no_compiler, "Triton cannot start: Failed to find C compiler"),
    "ok": (_gpu, "^$"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    arrange, reason = CASES[case]
    with monkeypatch.context() as patch:
        arrange(patch)
        found = backend.problem.__wrapped__()
    assert re.search(reason, found), found


def test_auto_prefers_cuda_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDCLIP_BACKEND", raising=False)
    monkeypatch.setattr(backend, "usable", lambda: True)
    assert select.resolve("auto").take_triton
    monkeypatch.setattr(cuda, "usable_devices", lambda: 0b01)
    for all_devices, left_to_triton in ((0b01, False), (0b11, True)):
        monkeypatch.setattr(cuda, "serves_all", lambda served, every=all_devices: served == every)
        choice = select.resolve("auto")
        assert choice.cuda_devices == 0b01
        assert choice.take_triton == left_to_triton
    monkeypatch.undo()
    assert not select.resolve("auto").take_triton or torch.accelerator.is_available()


def test_triton_is_not_imported_for_nothing() -> None:
    """It takes a second: neither ``import fusedclip`` nor a clip on the CPU pays for it."""
    script = (
        "import sys, torch, fusedclip\n"
        "p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4)\n"
        "fusedclip.clip_([p], 1.0)\n"
        "assert 'triton' not in sys.modules\n"
    )
    run = forked.python("-W", "ignore", "-c", script)
    assert run.returncode == 0, run.stderr
