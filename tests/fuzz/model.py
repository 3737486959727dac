"""What each call must do, in fp64 and without fusedclip."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.memory import Held
from tests.helpers import FLOAT_DTYPES, NORM_RTOL

_WIDE = (torch.float64, torch.complex128)

# Below these a norm loses digits: fp32's own, and the root of what an fp64 square can be.
_SMALLEST = {torch.float32: 2.0**-149, torch.float64: 1e-150}


def total_norm(held: Sequence[Held], order: float, inv_scale: float = 1.0) -> float:
    """The p-norm of all values as one vector; for other orders than 2 and inf, of the norms."""
    values = [wide_values(h.twin) * inv_scale for h in held]
    if order in (2.0, math.inf):
        return _norm_of_all(torch.cat([torch.zeros(1, dtype=torch.float64), *values]), order)
    norms = [torch.linalg.vector_norm(v, order) for v in values]
    return float(torch.linalg.vector_norm(torch.stack(norms), order)) if norms else 0.0


def _norm_of_all(values: Tensor, order: float) -> float:
    largest = float(values.abs().max())  # max keeps NaN
    if order == math.inf or not math.isfinite(largest) or largest == 0.0:
        return largest
    return largest * math.sqrt(float((values / largest).square().sum()))


def wide_values(tensor: Tensor) -> Tensor:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = tensor.abs()
    return tensor.to(torch.float64).flatten()


def check_norm(actual: Tensor, held: Sequence[Held], expected: float, order: float) -> float:
    """The norm that a call gave against the model's; returns it as a number."""
    if not held:
        assert actual.item() == 0.0
        return 0.0
    wide = any(h.grad.dtype in _WIDE for h in held)
    assert actual.dtype == (torch.float64 if wide else torch.float32)
    only_wide = all(h.grad.dtype in _WIDE for h in held) and order in (2.0, math.inf)
    rtol = NORM_RTOL[torch.float64 if only_wide else torch.float32]
    if not wide:
        expected = torch.tensor(expected, dtype=torch.float64).float().item()
    torch.testing.assert_close(
        actual.double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=_SMALLEST[actual.dtype],
        equal_nan=True,
    )
    return float(actual)


def coefficient(norm: float, max_norm: float) -> float:
    """``min(1, max_norm / (norm + 1e-6))``; an infinite threshold never clips."""
    if max_norm == math.inf:
        return 1.0
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # NaN stays


@dataclass(frozen=True)
class Outcome:
    """What happens to each value of a gradient: times ``factor``, or 0."""

    factor: float
    zero: bool = False


def outcome(norm: float, max_norm: float, nonfinite: str, inv_scale: float = 1.0) -> Outcome:
    if not math.isfinite(norm):
        if nonfinite == "zero":
            return Outcome(0.0, zero=True)
        if nonfinite == "unclipped":
            return Outcome(inv_scale)
    return Outcome(inv_scale * coefficient(norm, max_norm))


def check_scaled(held: Held, result: Outcome) -> bool:
    """The gradient against its twin, scaled; the twin follows. Whether a value may have changed.

    The product is fp32 (fp64 for fp64), rounded once to the gradient's type, bit for bit; a factor
    that is 1 in that precision leaves the gradient alone.
    """
    dtype = held.grad.dtype
    factor = result.factor
    if dtype not in _WIDE:
        factor = float(np.float32(factor))
    if not result.zero and factor == 1.0:
        check_untouched(held)
        return False
    if result.zero:
        expected = torch.zeros_like(held.twin)
    elif dtype in FLOAT_DTYPES and torch.finfo(dtype).bits < 32:
        expected = (held.twin.float() * factor).to(dtype)
    else:
        expected = held.twin * factor
    exact = held.plain
    torch.testing.assert_close(
        held.grad.detach().to_dense(),
        expected.to_dense(),
        rtol=0 if exact else 1e-6,
        atol=0,
        equal_nan=True,
    )
    held.accept()
    return True


def check_untouched(held: Held) -> None:
    """Bit for bit, NaN and the sign of zero included (the arena's own check sees those)."""
    torch.testing.assert_close(held.grad.detach(), held.twin, rtol=0, atol=0, equal_nan=True)


@dataclass
class AdaGCModel:
    """AdaGC with its defaults and a warm-up of one step, for norms of which 0 says nothing."""

    absolute: float
    count: int
    means: list[float] = field(default_factory=list)

    def factors(self, norms: Sequence[float]) -> list[float]:
        good = [math.isfinite(norm) and norm > 0.0 for norm in norms]
        if not self.means:
            whole = _norm_of_all(torch.tensor(norms, dtype=torch.float64), 2.0)
            h = math.nan if math.isnan(whole) else min(1.0, self.absolute / max(whole, 1e-300))
            usable = math.isfinite(whole)
            self.means = [
                h * norm if ok and usable else math.inf
                for norm, ok in zip(norms, good, strict=True)
            ]
            return [h] * self.count
        factors = []
        for i, (norm, ok) in enumerate(zip(norms, good, strict=True)):
            limit = 1.05 * self.means[i]
            factors.append(coefficient(norm, limit + 1e-6))
            if ok and math.isinf(limit):
                self.means[i] = norm
            elif ok:
                self.means[i] += 0.02 * (min(norm, limit) - self.means[i])
        return factors


@dataclass
class AutoClipModel:
    percentile: float
    window: int
    warmup: int
    norms: list[float] = field(default_factory=list)

    def threshold(self, norm: float) -> float:
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-self.window :]
        if len(self.norms) < max(self.warmup, 1):
            return math.inf
        return float(np.percentile(self.norms, self.percentile))


@dataclass
class ZClipModel:
    alpha: float
    z: float
    warmup: int
    first: list[float] = field(default_factory=list)
    mean: float = 0.0
    variance: float = 0.0

    def threshold(self, norm: float) -> float:
        warming = len(self.first) < self.warmup
        if not math.isfinite(norm):
            return math.inf if warming else self.mean
        if warming:
            self.first.append(norm)
            self.mean, self.variance = float(np.mean(self.first)), float(np.var(self.first))
            return math.inf
        deviation = math.sqrt(self.variance)
        score = (norm - self.mean) / (deviation + 1e-6)
        limit = self.mean + self.z**2 / score * deviation if score > self.z else math.inf
        value = min(norm, limit)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * value
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (value - self.mean) ** 2
        return limit
