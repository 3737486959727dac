"""Checks of the arguments that several functions share; they raise before anything is touched."""

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedclip.backends.reference import NONFINITE
from fusedclip.rule import Adaptive, Threshold

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# What users may ask for; "unclipped" is what a loss scale does.
CHOICES = tuple(name for name in NONFINITE if name != "unclipped")


def checked_max_norm(max_norm: float | Tensor) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        if max_norm.dim() != 0 or max_norm.is_complex():
            raise ValueError(
                f"max_norm: expected a number or a real 0-dim tensor, got shape "
                f"{tuple(max_norm.shape)}, {max_norm.dtype}"
            )
        if max_norm.device.type != "cpu" or torch.compiler.is_compiling():
            return max_norm  # its value is on the device; reading it would wait for the device
        max_norm = max_norm.item()
    # float first: asking the abstract class is slow.
    elif isinstance(max_norm, bool) or not isinstance(max_norm, (float, numbers.Real)):
        raise TypeError(
            f"max_norm: expected a number or a 0-dim tensor, got {type(max_norm).__name__}"
        )
    limit = float(max_norm)
    if not limit >= 0.0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {limit}")
    return limit


def is_policy(threshold: Threshold | None) -> "TypeIs[Adaptive]":
    return hasattr(threshold, "threshold") and not isinstance(threshold, Tensor)


def checked_skip(skip_above: Threshold | None) -> Threshold | None:
    """The norm above which a step is left out: as ``checked_max_norm``, a policy or ``None``."""
    if skip_above is None or is_policy(skip_above):
        return skip_above
    try:
        return checked_max_norm(skip_above)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("max_norm", "skip_above", 1)) from None


def checked_norm_type(norm_type: float) -> float:
    try:
        order = float(norm_type)
    except (TypeError, ValueError) as error:
        raise type(error)(f"norm_type: expected a number or 'inf', got {norm_type!r}") from None
    if math.isnan(order):
        raise ValueError("norm_type: expected a number or 'inf', got NaN")
    return order


def checked_nonfinite(nonfinite: str, choices: tuple[str, ...] = CHOICES) -> str:
    if nonfinite not in choices:
        raise ValueError(f"nonfinite: expected one of {choices}, got {nonfinite!r}")
    return nonfinite


def checked_number(name: str, value: Any, low: float, high: float, interval: str) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    inside = real and low < value <= high and (value < high or interval.endswith("]"))
    if not inside:
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}")


def checked_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
