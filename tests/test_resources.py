"""What a call costs beside the arithmetic: memory that does not grow with the gradients."""

from pathlib import Path

import pytest

from tests import forked

_SCRIPT = """
import sys, torch, fusedclip

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

def clip(call):
    params = [torch.nn.Parameter(torch.empty(333_333)) for _ in range(120)]  # 160 MB
    for p in params:
        p.grad = torch.ones_like(p)
    small = params[:2]
    call(small, 1e9), call(small, 1.0)  # threads and code are there before the measurement
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    call(params, 1e9), call(params, 1.0)
    return status("VmHWM") - before

copying = lambda params, max_norm: torch.cat([p.grad for p in params]).norm()
print(clip(fusedclip.clip_ if sys.argv[1] == "fusedclip" else copying))
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounting"
)


def _extra_kib(what: str) -> int:
    return int(forked.python("-W", "ignore", "-c", _SCRIPT, what, check=True).stdout)


def test_peak_extra_memory_is_below_1_mb() -> None:
    assert _extra_kib("fusedclip") < 1000


def test_the_measurement_sees_a_copy() -> None:
    """The twin: a clip that flattens the gradients first is caught."""
    assert _extra_kib("a copy") > 100_000
