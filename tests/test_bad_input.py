"""Bad input raises before any gradient is touched, says which tensor, and what to do."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedclip
from fusedclip.backends import select
from tests.helpers import clones, parameters, same_bits


def _good() -> torch.Tensor:
    return torch.tensor([30.0, 40.0])


def _shared() -> list[nn.Parameter]:
    flat = torch.ones(10)
    return parameters(flat[:6], flat[5:])


def _with_grad(grad: torch.Tensor) -> list[nn.Parameter]:
    # .grad refuses another dtype or layout than the parameter's, so both are made alike.
    p = torch.zeros_like(grad)
    p.grad = grad
    return [*parameters(_good()), p]


GRADIENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "overlap": (_shared, ValueError, r"grads\[0\] and grads\[1\]: .*overlap.*clone"),
    "expanded": (
        lambda: parameters(_good(), torch.ones(1).expand(4)),
        ValueError,
        r"grads\[1\]: more than one element.*\(4,\).*clone\(\)",
    ),
    "meta": (
        lambda: parameters(_good(), torch.ones(3, device="meta")),
        ValueError,
        r"grads\[1\] \(shape \(3,\), torch.float32\): .*meta.*to_empty",
    ),
    "integer": (
        lambda: _with_grad(torch.ones(3, dtype=torch.int32)),
        ValueError,
        r"grads\[1\].*torch.int32.*convert",
    ),
    "float8": (
        lambda: _with_grad(torch.ones(3).to(torch.float8_e4m3fn)),
        ValueError,
        r"grads\[1\].*float8_e4m3fn",
    ),
    "csr": (
        lambda: _with_grad(torch.eye(3).to_sparse_csr()),
        ValueError,
        r"grads\[1\] .*expected a dense gradient, got torch.sparse_csr; .*to_dense",
    ),
    "named_parameters": (
        lambda: nn.Linear(2, 2).named_parameters(),
        TypeError,
        r"parameters\[0\]: expected a Tensor, got tuple; .*not named_parameters",
    ),
    "not a tensor": (
        lambda: [*parameters(_good()), "weight"],
        TypeError,
        r"parameters\[1\]: expected a Tensor, got str",
    ),
    "not iterable": (lambda: 3, TypeError, "parameters: expected .* got int"),
}


@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_gradients(backend: str, case: str) -> None:
    make, kind, message = GRADIENTS[case]
    bad = make()
    held = [p for p in bad if getattr(p, "grad", None) is not None] if type(bad) is list else []
    dense = [p for p in held if p.grad.layout == torch.strided and p.device.type != "meta"]
    dense = [p for p in dense if p.grad.dtype == torch.float32]
    before = clones(dense)
    with pytest.raises(kind, match=message):
        fusedclip.clip_(bad, 1.0, backend=backend)
    assert all(same_bits(p.grad, old) for p, old in zip(dense, before, strict=True))


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": ({"max_norm": -1.0}, ValueError, "max_norm: expected a threshold >= 0, got -1.0"),
    "nan": ({"max_norm": math.nan}, ValueError, "max_norm: .*nan"),
    "nan tensor": (
        {"max_norm": torch.tensor(math.nan, device="cpu")},
        ValueError,
        "max_norm: .*nan",
    ),
    "string": ({"max_norm": "1.0"}, TypeError, "max_norm: expected a number.*got str"),
    "bool": ({"max_norm": True}, TypeError, "max_norm: .*got bool"),
    "vector": ({"max_norm": torch.ones(2)}, ValueError, r"max_norm: .*0-dim.*\(2,\)"),
    "norm type": ({"norm_type": "two"}, ValueError, "norm_type: .*'two'"),
    "nan norm type": ({"norm_type": math.nan}, ValueError, "norm_type: .*NaN"),
    "policy": ({"nonfinite": "skip"}, ValueError, "nonfinite: expected one of .*got 'skip'"),
    "two policies": (
        {"nonfinite": "zero", "error_if_nonfinite": True},
        ValueError,
        "contradicts",
    ),
    "backend": ({"backend": "cudnn"}, ValueError, "backend: expected one of .*got 'cudnn'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    change, kind, message = ARGUMENTS[case]
    params = parameters(_good())
    with pytest.raises(kind, match=message):
        fusedclip.clip_(params, **{"max_norm": 1.0, **change})
    assert same_bits(params[0].grad, _good())


@pytest.mark.parametrize("name", [name for name in select.NAMES if name != "reference"])
def test_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Asked for by name it raises, with the reason; nothing else serves in its place."""
    monkeypatch.setattr(f"fusedclip.backends.{name}.problem", lambda: "out of order")
    params = parameters(_good())
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: out of order"):
        fusedclip.clip_(params, 1.0, backend=name)
    assert same_bits(params[0].grad, _good())


def test_sparse_gradient_of_an_undefined_norm(backend: str) -> None:
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.sparse_coo_tensor([[1]], [1.0], (5,), check_invariants=True)
    with pytest.raises(ValueError, match=r"grads\[0\].*sparse COO.*norm_type 1, 2 and inf.*3"):
        fusedclip.clip_([p], 1.0, 3.0, backend=backend)
