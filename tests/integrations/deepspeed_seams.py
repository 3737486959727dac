"""DeepSpeed's functions one by one: patched they give and write what they do by themselves.

The engines of ``deepspeed_cases`` know data parallelism alone. What counts where with tensor and
pipeline parallel ranks, and what norms that are not finite do, is asked here of each function.
"""

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fusedclip.integrations import deepspeed as integration
from fusedclip.integrations.deepspeed import _UTILS, _ZERO_1_2, _ZERO_3
from tests.distributed.processes import Case
from tests.integrations.harness import counted_kernels

CASES: dict[int, dict[str, Case]] = {2: {}}


def case(function: Case) -> Case:
    @functools.wraps(function)
    def with_deepspeed() -> None:
        import deepspeed

        os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "LOCAL_SIZE": "2"}
        deepspeed.init_distributed(verbose=False)  # takes the group that is there
        function()

    CASES[2][function.__name__] = with_deepspeed
    return function


def _grads(*, bad: float | None = None) -> list[torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    grads = [torch.randn(n) for n in (5, 70_000, 3, 11)]
    if bad is not None:
        grads[2][1] = bad
    return grads


def _marked(name: str | None, tensor: torch.Tensor) -> nn.Parameter:
    made = nn.Parameter(tensor.clone())
    made.grad = tensor.clone()
    if name is not None:
        setattr(made, name, True)
    return made


def _parameters(grads: list[torch.Tensor]) -> list[nn.Parameter]:
    """Whole, of a tensor-parallel layer, of a layer that another pipeline stage has too, whole."""
    marks = (None, "model_parallel", "ds_pipe_replicated", None)
    return [_marked(mark, grad) for mark, grad in zip(marks, grads, strict=True)]


class _ModelParallel:
    """An ``mpu`` of two ranks, as Megatron's."""

    get_model_parallel_rank = staticmethod(dist.get_rank)
    get_tensor_model_parallel_rank = get_model_parallel_rank

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        return dist.group.WORLD


def _optimizer(rank: int) -> SimpleNamespace:
    """What DeepSpeed's methods read of a ZeRO optimizer."""

    import deepspeed.comm

    def all_reduce(tensor: torch.Tensor, op: Any) -> None:
        deepspeed.comm.all_reduce(tensor, op=op)

    return SimpleNamespace(
        dp_process_group=dist.group.WORLD,
        model_parallel_rank=rank,
        device="cpu",
        loss_scale=4.0,
        clip_grad=0.5,
        _model_parallel_all_reduce=all_reduce,
        _assert_same_partition_group=lambda params: None,
        _get_param_partition_group=lambda param: dist.group.WORLD,
        _grad_norm_counts_every_rank=lambda params, group: rank == 2,
        _autoep_expert_parallel_group=lambda params: None,
    )


def _same(name: str, *arguments: Callable[[], Any], measured: bool = True) -> Any:
    """The function gives the same while patched, and writes the same; what it gives.

    Args:
        measured: some gradient counts on this rank, so that a kernel runs.
    """
    module, _, path = name.partition(":")
    results, written = [], []
    for patched in (False, True):
        with integration.patch() if patched else contextlib.nullcontext():
            function: Any = importlib.import_module(module)
            for part in path.split("."):
                function = getattr(function, part)
            given = [make() for make in arguments]
            with counted_kernels() as kernels:
                results.append(function(*given))
            written.append([t for value in given for t in _tensors(value)])
        assert bool(kernels.calls) == (patched and measured), kernels.calls
    ours, theirs = (torch.as_tensor(result or 0.0).flatten() for result in reversed(results))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0, check_dtype=False)
    for ours, theirs in zip(written[1], written[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0, equal_nan=True)
    return results[0]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value if value.grad is None else value.grad
    elif isinstance(value, SimpleNamespace):
        for inner in vars(value).values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


@case
def which_gradients_count() -> None:
    """Replicas are counted once, padding never, whatever the rank; non-finite norms are -1."""

    def padded() -> list[torch.Tensor]:
        grads = _grads()
        padding = torch.full((4,), 100.0)
        padding._zero_padding = True
        return [*grads[:2], padding, *grads[2:]]

    def params() -> list[nn.Parameter]:
        return _parameters(_grads())

    norms = set()
    for rank in (0, 1, 2):
        norms.add(
            float(_same(f"{_ZERO_1_2}:DeepSpeedZeroOptimizer.get_grad_norm_direct",
                        lambda rank=rank: _optimizer(rank), padded, params))
        )  # fmt: skip
        norms.add(
            float(_same(f"{_ZERO_3}:DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct",
                        lambda rank=rank: _optimizer(rank), _grads, params))
        )  # fmt: skip
    assert len(norms) > 2, "the cases do not differ"
    for make, alone in (
        (params, False),
        (lambda: params()[1:2], False),
        (lambda: params()[:1], True),
    ):
        counted = not alone or dist.get_rank() == 0
        _same(f"{_UTILS}:get_weight_norm", make, lambda: 2, _ModelParallel, measured=counted)
        _same(f"{_UTILS}:clip_grad_norm_", make, lambda: 0.5, lambda: 2, _ModelParallel)
    _same(f"{_UTILS}:get_weight_norm", lambda: params()[2:3], measured=False)


@case
def masks_of_flat_gradients() -> None:
    """What other ranks hold too is left out of a flat gradient by ranges."""
    flat = [nn.Parameter(torch.zeros(50)) for _ in range(3)]
    for p in flat:
        p.grad = torch.randn(50)

    masks = [torch.tensor([[0, 7], [20, 30], [44, 50]]), torch.tensor([[3, 9]]), torch.tensor([])]
    name = f"{_UTILS}:get_flattened_grad_norm"
    masked = _same(name, lambda: flat, lambda: 2, lambda: None, lambda: masks)
    assert masked < _same(name, lambda: flat, lambda: 2, lambda: None, lambda: None)
    everything = [torch.tensor([[0, 50]])] * 3
    with integration.patch():
        from deepspeed.runtime import utils

        assert utils.get_flattened_grad_norm(flat, 2, None, everything) == 0.0


@case
def norms_that_are_not_finite() -> None:
    for bad in (math.inf, math.nan):
        grads = functools.partial(_grads, bad=bad)
        params = lambda grads=grads: _parameters(grads())  # noqa: E731
        optimizer = functools.partial(_optimizer, 0)
        method = "DeepSpeedZeroOptimizer.get_grad_norm_direct"
        whole = lambda grads=grads: [_marked(None, g) for g in grads()]  # noqa: E731
        assert _same(f"{_ZERO_1_2}:{method}", optimizer, grads, whole) == -1
        method = "DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct"
        assert _same(f"{_ZERO_3}:{method}", optimizer, grads, params) == -1
        assert _same(f"{_UTILS}:get_global_norm_of_tensors", grads) == -1
        assert _same(f"{_UTILS}:get_weight_norm", grads) == -1
        assert _same(f"{_UTILS}:get_flattened_grad_norm", whole) == -1


@case
def rescaled_by_any_norm() -> None:
    """Below, above, invalid: what is written is DeepSpeed's, bit patterns of NaN aside."""
    for norm in (0.1, 7.0, 1e30, math.inf, math.nan, -1.0):
        total = functools.partial(torch.tensor, norm)
        for bad in (None, math.inf):
            grads = functools.partial(_grads, bad=bad)
            nested = lambda grads=grads: [grads(), torch.randn(3)]  # noqa: E731
            optimizer = functools.partial(_optimizer, 0)
            torch.manual_seed(0)
            state = torch.get_rng_state()

            def lists(nested: Any = nested, state: Any = state) -> list[Any]:
                torch.set_rng_state(state)
                return nested()

            method = "DeepSpeedZeroOptimizer.unscale_and_clip_grads"
            _same(f"{_ZERO_1_2}:{method}", optimizer, lists, total)

            def stage_3(grads: Any = grads) -> SimpleNamespace:
                groups = [_marked(None, grad) for grad in grads()]
                return SimpleNamespace(
                    loss_scale=4.0, clip_grad=0.5, fp32_partitioned_groups_flat=groups
                )

            method = "DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads"
            _same(f"{_ZERO_3}:{method}", stage_3, lambda: 2, total)
            if norm == norm:  # DeepSpeed's comparison with NaN raises nothing and clips nothing
                _same(f"{_UTILS}:clip_tensors_by_global_norm", grads, lambda: 0.5, total)
