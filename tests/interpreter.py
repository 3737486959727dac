"""Triton's interpreter with correct bfloat16, and without the work that it does for nothing.

The interpreter keeps bfloat16 values as bits and converts them itself: subnormal ones become 0, and
rounding up does not carry into the exponent. A GPU does neither. torch's conversion, which rounds
to the nearest even as GPUs do, takes its place.

Two things take longer than the kernels themselves. For every function that a kernel calls, the
interpreter puts its own functions into ``triton.language`` once more: once for each launch will do.
And it computes whether integers overflow, but looks at the result in its debug mode alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_own_conversion = interpreter._convert_float
_own_patch = interpreter._patch_lang


def improve() -> None:
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_language
    interpreter._LangPatchScope = _Scope
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    bits = np.ascontiguousarray(values).copy()
    if source == tl.bfloat16 and target == tl.float32:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.int16)
        return rounded.numpy().view(np.uint16)
    return _own_conversion(values, source, target, rounding)


class _Scope(interpreter._LangPatchScope):
    """What is patched. Only a launch restores its scope, and with it ends what is known here."""

    languages: ClassVar[set[str]] = set()

    def restore(self) -> None:
        super().restore()
        self.languages.clear()


def _patch_language(function: Callable[..., Any]) -> _Scope:
    if _languages(function) <= _Scope.languages:
        return _Scope()
    _Scope.languages |= _languages(function)
    return _own_patch(function)


@functools.cache
def _languages(function: Callable[..., Any]) -> frozenset[str]:
    seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return frozenset(module.__name__ for module in seen)
