"""``python -m bench.accuracy``: its measurement sees errors, and its table."""

import math

import pytest
import torch

from bench import accuracy
from tests.helpers import NORM_RTOL


@pytest.mark.parametrize("dtype", accuracy._MAGNITUDES)
def test_the_cpu_keeps_the_promise(dtype: torch.dtype) -> None:
    clip = accuracy._clip_of("cpu")
    for magnitude in accuracy._MAGNITUDES[dtype]:
        row = accuracy._row("cpu", clip, dtype, magnitude, ((1000,), (3, 17)), seeds=1)
        assert row.lists == 2
        assert row.norm_max <= NORM_RTOL.get(dtype, NORM_RTOL[torch.float32])


def test_a_rounded_norm_and_a_rounded_factor_are_seen() -> None:
    """The twin: torch's bf16 norm has 8 bits."""
    row = accuracy._row(
        "torch", accuracy._clip_of("torch"), torch.bfloat16, 1.0, ((1000,), (3, 17)), seeds=2
    )
    assert row.norm_max > 1e-4 and row.element_max > 2.0**-9


def test_an_infinite_norm_is_an_infinite_error() -> None:
    clip = accuracy._clip_of("torch")
    row = accuracy._row("torch", clip, torch.float32, 1e30, ((1000,),), seeds=1)
    assert row.norm_max == math.inf and row.element_max == 1.0


def test_table() -> None:
    rows = [
        accuracy.Row(name, "fp32", 1e-30, 2e-8, 0.0, math.nan, math.nan, 6)
        for name in ("torch", "cpu")
    ]
    lines = accuracy.markdown(rows).splitlines()
    assert lines[0] == "| gradients | error of | torch | cpu |"
    assert lines[2] == "| fp32, 1e-30 | norm | 2e-08 (0) | 2e-08 (0) |"
    assert lines[3] == "| | elements | - (-) | - (-) |"
