"""Who clips in the benchmark on a GPU: fusedclip, torch, and what else can be imported.

All take a list of parameters and a threshold.
"""

import functools
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fusedclip

Clip = Callable[[Sequence[nn.Parameter], float], object]

_MOST_TO_COMPILE = 300  # tensors: torch.compile takes minutes for longer lists


def contestants(device: torch.device, tensors: int) -> dict[str, Clip]:
    """Who can run here, by name."""
    found: dict[str, Clip] = {"torch": nn.utils.clip_grad_norm_}
    available = fusedclip.available_backends()
    if device.type == "cuda" and available["cuda"] != "ok":
        raise RuntimeError(f"the CUDA backend cannot run here: {available['cuda']}")
    found["fusedclip"] = fusedclip.clip_
    if device.type == "cuda" and available["triton"] == "ok":
        found["fusedclip triton"] = lambda p, m: fusedclip.clip_(p, m, backend="triton")
    if tensors <= _MOST_TO_COMPILE:
        found["torch.compile"] = _compiled()
    for name, load in _PEERS.items():
        try:
            found[name] = load()
        except ImportError:
            continue
    return found


def _compiled() -> Clip:
    def clip(grads: list[Tensor], max_norm: Tensor) -> Tensor:
        norm = nn.utils.get_total_norm(grads)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor)
        return norm

    torch._dynamo.reset()
    compiled = torch.compile(clip, dynamic=False)

    @functools.cache  # a number would be compiled in
    def on_device(max_norm: float, device: torch.device) -> Tensor:
        return torch.tensor(max_norm, device=device)

    def run(parameters: Sequence[nn.Parameter], max_norm: float) -> object:
        grads = gradients_of(parameters)
        return compiled(grads, on_device(max_norm, grads[0].device))

    return run


def _apex() -> Clip:
    clip: Clip = importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_
    return clip


def _deepspeed() -> Clip:
    clip = importlib.import_module("deepspeed.runtime.utils").clip_grad_norm_
    return lambda parameters, max_norm: clip(list(parameters), max_norm)


def _transformer_engine() -> Clip:
    """Its two multi-tensor kernels, used as Megatron uses them: one call of each a dtype."""
    kernels = importlib.import_module("transformer_engine.pytorch.optimizers")

    def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        grads = gradients_of(parameters)
        overflow = torch.zeros(1, dtype=torch.int, device=grads[0].device)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            by_dtype.setdefault(grad.dtype, []).append(grad)
        norms = [
            kernels.multi_tensor_applier(kernels.multi_tensor_l2norm, overflow, [same], False)[0]
            for same in by_dtype.values()
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.cat(norms))
        factor = max_norm / (norm.item() + 1e-6)
        if factor < 1.0:
            for same in by_dtype.values():
                kernels.multi_tensor_applier(
                    kernels.multi_tensor_scale, overflow, [same, same], factor
                )
        return norm

    return clip


_PEERS: dict[str, Callable[[], Clip]] = {
    "apex": _apex,
    "Transformer Engine": _transformer_engine,
    "deepspeed": _deepspeed,
}


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
