"""Under ``torch.compile`` the clip is one operator: no graph break, the same result."""

import copy

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


GRADS = [torch.randn(3), torch.randn(2, 2), torch.randn(4).bfloat16()]
OPERATORS = {
    "clip_": (GRADS, torch.tensor(0.5).double(), 2.0, "propagate", "auto"),
    "total_norm": (GRADS, 2.0, "propagate"),
    "scale_": (GRADS, 0.5, torch.tensor(3.0)),
    "clamp_": (GRADS, 0.5),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_registration(name: str) -> None:
    """torch's own checks of the schema, the fake implementation, the mutation and the tracing."""
    arguments = copy.deepcopy(OPERATORS[name])
    torch.library.opcheck(getattr(torch.ops.fusedclip, name).default, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_plain_gradients_are_in_the_graph(name: str) -> None:
    """One operator and no arithmetic: the compiled clip is the native one."""
    function = {
        "clip_": lambda: fusedclip.clip_grad_norm_(params, 1.0),
        "total_norm": lambda: fusedclip.get_total_norm([p.grad for p in params]),
        "scale_": lambda: fusedclip.clip_grads_with_norm_(params, 1.0, torch.tensor(5.0)),
        "clamp_": lambda: fusedclip.clip_grad_value_(params, 0.5),
    }[name]
    params = parameters(torch.tensor([3.0, 4.0]))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(function, fullgraph=True, backend=keep)()
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert f"fusedclip.{name}" in called
    assert not any("norm" in target for target in called if not target.startswith("fusedclip"))


def test_an_error_in_a_graph() -> None:
    params = parameters(torch.tensor([3.0, float("inf")]))
    function = torch.compile(
        lambda: fusedclip.get_total_norm([params[0].grad], error_if_nonfinite=True),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    with pytest.raises(fusedclip.NonfiniteGradientError):
        function()
