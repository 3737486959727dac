"""What ``test_megatron`` runs on two ranks: Megatron-core's optimizer on two pipeline stages.

Megatron writes ``device="cuda"`` into its functions and asserts that gradients are there. Here that
means the CPU: ``pretended_cuda`` redirects those two things, for the runs with and without
fusedclip alike. Everything else is Megatron's own.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.overrides import TorchFunctionMode

from fusedclip.integrations import megatron as integration
from tests.distributed.processes import Case
from tests.integrations.harness import Run, counted_kernels, parameters_of, twice

UNTOUCHED = tuple(
    f"megatron.core.optimizer.{module}:{name}"
    for module, names in {
        "clip_grads": ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"),
        "optimizer": ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"),
        "layer_wise_optimizer": ("get_grad_norm_fp32",),
    }.items()
    for name in names
)
_MAX_NORM = 22.0
_STEPS = 10

CASES: dict[int, dict[str, Case]] = {2: {}}


class _OnTheCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is Tensor.type and result == "torch.FloatTensor":
            return "torch.cuda.FloatTensor"
        return result


@contextmanager
def pretended_cuda() -> Iterator[None]:
    with _OnTheCpu():
        yield


def case(function: Case) -> Case:
    @functools.wraps(function)
    def with_megatron() -> None:
        from megatron.core import parallel_state

        with pretended_cuda():
            if not parallel_state.model_parallel_is_initialized():
                parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
            function()

    CASES[2][function.__name__] = with_megatron
    return function


def _optimizer(parameters: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    config = OptimizerConfig(optimizer="sgd", lr=1e-2, clip_grad=_MAX_NORM)
    return FP32Optimizer(torch.optim.SGD(parameters, lr=1e-2), config, lambda *_: None)


def _train() -> Run:
    """Each rank is a stage with parameters of its own; the norm is of all of them."""
    torch.manual_seed(10 + dist.get_rank())
    width = 12 + 5 * dist.get_rank()
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
    optimizer = _optimizer(model.parameters())
    norms = []
    for _ in range(_STEPS):
        inputs = torch.randn(16, 8)
        loss = (model(inputs) - 2 * inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        (loss * (1 + dist.get_rank())).backward()
        successful, norm, _ = optimizer.step()
        assert successful
        norms.append(norm)
    return Run(norms, parameters_of(model))


@case
def pipeline_stages() -> None:
    seen = twice(
        _train, max_norm=_MAX_NORM, patch=integration.patch, untouched=UNTOUCHED,
        parameter_atol=1e-5,
    )  # fmt: skip
    assert min(seen.torch.grad_norms) <= _MAX_NORM, seen.torch.grad_norms
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, seen.fusedclip.grad_norms)
    assert everywhere[0] == everywhere[1]


def _grads() -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    return [torch.randn(5), torch.randn(70_000), torch.randn(3, 4)]


def _norms(grads: Callable[[], Any], *arguments: Any) -> tuple[float, float]:
    """Megatron's and fusedclip's."""
    kernel_orders = {2.0, math.inf}
    from megatron.core.optimizer import clip_grads

    theirs = clip_grads.get_grad_norm_fp32(grads(), *arguments)
    with integration.patch(), counted_kernels() as kernels:
        ours = clip_grads.get_grad_norm_fp32(grads(), *arguments)
    assert isinstance(ours, float)
    if kernel_orders.issuperset(map(float, arguments[:1])):
        made = grads()
        assert bool(kernels.calls) == (isinstance(made, Tensor) or len(made) > 0)
    return theirs, ours


def _assert_close(norms: tuple[float, float]) -> None:
    # torch adds 70,000 absolute values in fp32, one by one in each lane.
    assert math.isclose(*norms, rel_tol=1e-5), norms


@case
def norms_of_any_order_and_group() -> None:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for order in (2, 2.0, 1.0, 3, math.inf):
        of_all = _norms(_grads, order)
        _assert_close(of_all)
        assert _norms(_grads, order, dist.group.WORLD) == of_all
        of_this_rank = _norms(_grads, order, alone)
        _assert_close(of_this_rank)
        assert order == math.inf or of_this_rank[1] < of_all[1]
    _assert_close(_norms(lambda: _grads()[0]))
    one_rank_has_none = _norms(lambda: _grads() if dist.get_rank() else [])
    _assert_close(one_rank_has_none)
    assert _norms(list) == (0.0, 0.0)


@case
def gradients_of_a_mesh() -> None:
    """Megatron's FSDP: DTensors, added up over their mesh first."""
    mesh = init_device_mesh("cpu", (2,))
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    torch.manual_seed(3)
    whole = [torch.randn(6, 4), torch.randn(9)]
    norms = _norms(lambda: [distribute_tensor(g, mesh, [Shard(0)]) for g in whole], 2, alone)
    _assert_close(norms)
    assert math.isclose(
        norms[1], torch.cat([g.flatten() for g in whole]).norm().item(), rel_tol=1e-6
    )


@case
def norms_that_are_not_finite() -> None:
    for bad in (math.inf, math.nan):

        def grads(bad: float = bad) -> list[Tensor]:
            made = _grads()
            if dist.get_rank():
                made[1][7] = bad
            return made

        theirs, ours = _norms(grads)
        assert theirs == ours or (math.isnan(theirs) and math.isnan(ours))
    # Megatron's squares overflow.
    assert _norms(lambda: [torch.full((4,), 1e30)])[0] == math.inf
    assert math.isclose(_norms(lambda: [torch.full((4,), 1e30)])[1], 8**0.5 * 1e30, rel_tol=1e-6)


@case
def rescaled_by_any_norm() -> None:
    from megatron.core.optimizer import clip_grads

    def parameters(decoupled: bool) -> list[Any]:
        name = "decoupled_grad" if decoupled else "grad"
        dtype = torch.bfloat16 if decoupled else torch.float32
        made = [SimpleNamespace(**{name: grad.to(dtype)}) for grad in _grads()]
        return [*made, SimpleNamespace(**{name: None})]

    for norm in (0.1, 7.0, 1e30, math.inf, math.nan):
        for decoupled in (False, True):
            given, expected = parameters(decoupled), parameters(decoupled)
            clip_grads.clip_grad_by_total_norm_fp32(expected, 0.5, norm, decoupled)
            with integration.patch(), counted_kernels() as kernels:
                clip_grads.clip_grad_by_total_norm_fp32(given, 0.5, norm, decoupled)
            assert bool(kernels.calls) == (norm >= 0.5)
            for ours, theirs in zip(given, expected, strict=True):
                for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True):
                    assert a is b is None or torch.equal(a, b)
