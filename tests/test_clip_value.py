"""clip_grad_value_ against torch's, bit for bit: dtypes, sizes, layouts, threads, edge cases."""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.clip_grad import clip_grad_value_ as torchs

import fusedclip
from fusedclip.backends import cpu, native
from tests import forked
from tests.helpers import FLOAT_DTYPES, clones, parameters, same_bits

# Around a row of lanes (64 fp32, 32 fp64 elements) and a chunk (65,536 elements).
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 65_535, 65_536, 65_537, 131_137]


def same_values(a: Tensor, b: Tensor) -> bool:
    """Bitwise, where a NaN is a NaN: torch has its own payload for half types."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and same_bits(a[~nan], b[~nan])


def values(numel: int, dtype: torch.dtype) -> Tensor:
    """Around 1, with the special values in changing places."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, 0.1, -0.1, 6e4])
    made = torch.randn(numel)
    places = made[:: max(1, numel // 97)]
    places.copy_(special.repeat(1 + len(places) // 9)[: len(places)])
    return made.to(dtype)


def compare(grads: list[Tensor], limit: Any, foreach: bool | None = None) -> None:
    """Clamps ``grads`` in place; their values, gaps included, are torch's."""
    theirs = parameters(*[grad.clone() for grad in grads])
    mine = parameters(*grads)
    assert fusedclip.clip_grad_value_(mine, limit, foreach) is None
    torchs(theirs, limit, foreach)
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.grad is grads[index]
        assert same_values(a.grad, b.grad), index


@pytest.mark.parametrize("limit", [0.5, 0.1, 1e-3, 0.0, 1.0, 65_504.0, -0.5, -0.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sizes(dtype: torch.dtype, limit: float) -> None:
    """0.1 and 1e-3 are rounded to the type first; a negative limit sets everything to it."""
    compare([values(numel, dtype) for numel in SIZES], limit)


@pytest.mark.parametrize("limit", [math.inf, -math.inf, math.nan, 65_505.0, 1e5, 1e300, -1e300])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_limits_that_not_every_type_holds(dtype: torch.dtype, limit: float) -> None:
    try:
        torchs(parameters(values(9, dtype)), limit)
    except RuntimeError as theirs:
        params = parameters(values(9, dtype))
        before = clones(params)
        with pytest.raises(RuntimeError) as ours:
            fusedclip.clip_grad_value_(params, limit)
        assert str(ours.value) == str(theirs)
        assert same_bits(params[0].grad, before[0])
    else:
        compare([values(9, dtype)], limit)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_half_value(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    every = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    for limit in (0.1, 1e-6, 1000.1):
        compare([every.clone()], limit)


@pytest.mark.parametrize("offset", range(1, 6))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_odd_addresses_and_what_lies_beside(dtype: torch.dtype, offset: int) -> None:
    buffer = torch.full((5, 1100), 9.0, dtype=dtype)
    inside = [buffer[i, offset : offset + n] for i, n in enumerate((1, 63, 64, 65, 1000))]
    for grad in inside:
        grad.copy_(torch.randn(len(grad)) * 3)
    mask = torch.ones_like(buffer, dtype=torch.bool)
    for i, grad in enumerate(inside):
        mask[i, offset : offset + len(grad)] = False
    compare(inside, 0.5)
    assert (buffer[mask] == 9.0).all()


def test_layouts() -> None:
    """Dense ones natively, those with holes by torch, all in one call."""
    torch.manual_seed(0)
    compare(
        [
            torch.randn(()),
            torch.randn(3, 5).t(),
            torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            torch.randn(6, 6)[::2, 1::2],
            torch.randn(4, 1).as_strided((4, 1), (1, 7)),
            torch.randn(5, dtype=torch.float64),
            torch.randint(-9, 9, (5,)).to(torch.bfloat16),
        ],
        0.5,
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    compare([torch.randn(n) for n in (700_001, 3, 65_536, 400_000)], 0.25)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limit", [0.3, "0.3", torch.tensor(0.3), 1], ids=repr)
def test_arguments(limit: Any, foreach: bool | None) -> None:
    compare([torch.randn(100)], limit, foreach)


@pytest.mark.parametrize("bad", ["x", None, [2]])
def test_bad_limits_raise_as_torch(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as theirs:
        torchs(parameters(torch.ones(2)), bad)
    with pytest.raises(theirs.type):
        fusedclip.clip_grad_value_(parameters(torch.ones(2)), bad)


def test_what_parameters_may_be() -> None:
    layer = nn.Linear(3, 2)
    for given in (layer, torch.optim.SGD(layer.parameters()), layer.parameters(), [layer.weight]):
        layer.weight.grad = torch.full((2, 3), 5.0)
        fusedclip.clip_grad_value_(given, 0.5)
        assert (layer.weight.grad == 0.5).all()
    assert fusedclip.clip_grad_value_(layer.bias, 0.5) is None  # no gradient
    assert fusedclip.clip_grad_value_([], 0.5) is None


def test_listed_twice_and_overlapping() -> None:
    buffer = torch.randn(2_000_000)
    expected = buffer.clamp(-0.5, 0.5)
    params = parameters(buffer[:1_500_000], buffer[500_000:])
    torch.set_num_threads(2)
    fusedclip.clip_grad_value_([*params, *params], 0.5)
    assert same_bits(buffer, expected)


def test_versions() -> None:
    """Autograd is told of what was written, and only of that list."""
    params = parameters(torch.tensor([0.1, -2.0]), torch.tensor([0.1]))
    versions = [p.grad._version for p in params]
    fusedclip.clip_grad_value_(params, 3.0)
    assert [p.grad._version for p in params] == versions
    fusedclip.clip_grad_value_(params, 1.0)
    assert all(p.grad._version > old for p, old in zip(params, versions, strict=True))


def test_a_gradient_with_a_graph() -> None:
    x = nn.Parameter(torch.tensor([2.0]))
    (x.grad,) = torch.autograd.grad(x**3, x, create_graph=True)
    fusedclip.clip_grad_value_([x], 1.0)
    assert x.grad.item() == 1.0


def test_sparse_gradients_raise_as_torch_and_before_any_change() -> None:
    sparse = torch.ones(4).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
        torchs(parameters(sparse), 0.5)
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    params[0].grad, params[1].grad = torch.full((4,), 5.0), sparse
    with pytest.raises(theirs.type):
        fusedclip.clip_grad_value_(params, 0.5)
    assert (params[0].grad == 5.0).all()


def test_self_overlapping_gradients_raise_as_torch() -> None:
    for call in (torchs, fusedclip.clip_grad_value_):
        with pytest.raises(RuntimeError, match="single memory location"):
            call(parameters(torch.ones(1).expand(4)), 0.5)


def test_dense_gradients_are_clamped_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the comparisons above can fail: kernels that do nothing are noticed."""
    monkeypatch.setattr(cpu, "clamp_", lambda grads, limit: None)
    with pytest.raises(AssertionError):
        compare([torch.randn(100)], 0.5)
    compare([torch.randn(6, 6)[::2, 1::2]], 0.5)  # torch's own
    monkeypatch.setenv("FUSEDCLIP_BACKEND", "reference")
    compare([torch.randn(100)], 0.5)


def test_a_limit_that_is_not_rounded_would_be_noticed() -> None:
    limit = torch.tensor(0.1).to(torch.bfloat16)
    assert limit.float().item() != pytest.approx(0.1, rel=1e-4)
    p = parameters(torch.ones(3, dtype=torch.bfloat16))
    fusedclip.clip_grad_value_(p, 0.1)
    assert same_bits(p[0].grad, limit.expand(3))


def test_the_binding_refuses_what_no_kernel_can() -> None:
    (grads,), _, _ = native.module.gather([torch.ones(3)], False, False, True, 0, 0, None)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="limit: expected a finite number"):
            grads.clamp_(bad, 1)
    with pytest.raises(ValueError, match="threads"):
        grads.clamp_(0.5, 0)
    assert grads.clamp_(0.5, 1) is True
    assert grads.clamp_(0.5, 1) is False


_ISA_SCRIPT = """
import torch, fusedclip
from fusedclip import _C
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    p = torch.nn.Parameter(torch.zeros(70_001, dtype=dtype))
    p.grad = torch.randn(70_001).to(dtype)
    expected = p.grad.clamp(-0.1, 0.1)
    fusedclip.clip_grad_value_(p, 0.1)
    assert torch.equal(p.grad, expected), dtype
print(_C.cpu_isa())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa: str) -> None:
    run = forked.python("-c", _ISA_SCRIPT, env={**os.environ, "FUSEDCLIP_CPU_ISA": isa})
    if run.returncode and isa != "baseline":
        assert isa in run.stderr  # a machine without it says so
        return
    assert run.stdout.split() == [isa], run.stderr
