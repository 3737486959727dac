"""What the tests share: parameters with given gradients, the fp64 truth, and the tolerances."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

# A run over an interpreted or emulated backend: fewer and smaller cases.
SMALL = os.environ.get("FUSEDCLIP_TEST_SMALL") == "1"

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# The promise for norms: 64 Ki products summed in fp32 over parallel lanes, then fp64.
NORM_RTOL = {torch.float32: 5e-7, torch.float64: 1e-12}

# One rounding of the factor (1/2 ulp of fp32), one of the product, one to the element type:
# at most 1 ulp of the element type where that is a half type, 2 ulp of fp32, 2 ulp of fp64 (whose
# factor carries the norm's own error).
ELEMENT_RTOL = {
    torch.float32: 2.0**-22 + 5e-7,
    torch.float64: 1e-12,
    torch.float16: 2.0**-10 + 5e-7,
    torch.bfloat16: 2.0**-7 + 5e-7,
}
# Below its smallest normal number a type's spacing is constant.
ELEMENT_ATOL = {
    torch.float32: 2.0**-149,
    torch.float64: 2.0**-1074,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}


def parameters(*grads: Tensor | None) -> list[nn.Parameter]:
    """One parameter for each gradient, of the gradient's shape, dtype and device."""
    made = []
    for grad in grads:
        if grad is None:
            made.append(nn.Parameter(torch.zeros(3)))
            continue
        p = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device))
        p.grad = grad
        made.append(p)
    return made


def clones(params: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in params]


def exact_norm(grads: Sequence[Tensor | None], order: float = 2.0) -> float:
    """The norm of all values as one vector, in Python's exact summation."""
    values = [
        abs(v)
        for g in grads
        if g is not None
        for v in g.detach().to_dense().to(torch.float64).flatten().tolist()
    ]
    if any(math.isnan(v) for v in values):
        return math.nan
    if order == math.inf:
        return max(values, default=0.0)
    largest = max(values, default=0.0)
    if largest in (0.0, math.inf):
        return largest
    return largest * math.fsum((v / largest) ** order for v in values) ** (1.0 / order)


def exact_coefficient(norm: float, max_norm: float) -> float:
    if max_norm == math.inf:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))


def assert_norm(actual: Tensor, expected: float, *, exact_products: bool = True) -> None:
    """``exact_products=False``: an fp64 norm of a list that holds more than fp64."""
    assert actual.dim() == 0
    assert actual.dtype in NORM_RTOL
    rtol = NORM_RTOL[actual.dtype if exact_products else torch.float32]
    torch.testing.assert_close(
        actual.to(torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=1e-45 if actual.dtype == torch.float32 else 0.0,
        equal_nan=True,
    )


def assert_scaled(after: Tensor, before: Tensor, factor: float) -> None:
    """``after`` is ``before`` times ``factor``, rounded; bit for bit the same when factor is 1."""
    if factor == 1.0:
        assert same_bits(after, before)
        return
    expected = before.to(torch.float64) * factor
    torch.testing.assert_close(
        after.to(torch.float64),
        expected,
        rtol=ELEMENT_RTOL[before.dtype],
        atol=ELEMENT_ATOL[before.dtype],
        equal_nan=True,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN payloads and the sign of zero included."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.shape == b.shape and torch.equal(
        a.detach().contiguous().view(integer), b.detach().contiguous().view(integer)
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What is started inside hears SIGINT, also where these tests run in the background of a shell,
    which has its processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def least_seconds(
    *calls: Callable[[], object], restore: Callable[[], object] = lambda: None, rounds: int = 100
) -> list[float]:
    """What each call takes when nothing interrupts it: the least of many, made in turn.

    On a busy machine most calls of a millisecond still run to their end, but with caches that
    others have filled: that moves a median and hardly a minimum.
    """
    least = [math.inf] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            least[i] = min(least[i], time.perf_counter() - begin)
            restore()
    return least
