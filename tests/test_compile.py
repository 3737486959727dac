"""Under ``torch.compile`` the clip is one operator: no graph break, the same result."""

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from tests.helpers import assert_norm, exact_norm, parameters


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("max_norm", [0.1, 1e9], ids=["clipped", "not clipped"])
def test_fullgraph(compiler: str, max_norm: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float32))
    model(torch.randn(2, 4)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    norm = exact_norm(grads)

    @torch.compile(fullgraph=True, backend=compiler)
    def step(scale: Tensor) -> Tensor:
        return fusedclip.clip_(model, max_norm) * scale

    assert_norm(step(torch.tensor(1.0)), norm)
    factor = min(1.0, max_norm / (norm + 1e-6))
    for p, old in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, old * factor)


def test_drop_in_under_compile() -> None:
    params = parameters(torch.tensor([3.0, 4.0]), torch.zeros(2, dtype=torch.float64))

    @torch.compile(fullgraph=True, backend="eager")
    def step() -> Tensor:
        return fusedclip.clip_grad_norm_(params, 1.0)

    norm = step()
    assert norm.dtype == torch.float64
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))


def test_operator_registration() -> None:
    """torch's own checks of the schema, the fake implementation and the mutation."""
    torch.library.opcheck(
        torch.ops.fusedclip.clip_.default,
        ([torch.randn(3), torch.randn(2, 2)], torch.tensor(0.5).double(), 2.0, "propagate", "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )
