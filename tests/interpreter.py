"""Triton's interpreter with correct bfloat16.

The interpreter keeps bfloat16 values as bits and converts them itself: subnormal ones become 0, and
rounding up does not carry into the exponent. A GPU does neither. torch's conversion, which rounds
to the nearest even as GPUs do, takes its place.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_own_conversion = interpreter._convert_float


def correct_bfloat16() -> None:
    interpreter._convert_float = _convert_float


def _convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    bits = np.ascontiguousarray(values).copy()
    if source == tl.bfloat16 and target == tl.float32:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.int16)
        return rounded.numpy().view(np.uint16)
    return _own_conversion(values, source, target, rounding)
