"""Who clips in the benchmark on a GPU: fusedclip, torch, and what else can be imported.

All take a list of parameters; a clip takes a threshold as well. ``measure`` and ``scale`` are the
two halves of a clip alone, where a contestant has them apart.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedclip
from fusedclip.backends import cpu, cuda, select, triton
from fusedclip.gradients import gather

Clip = Callable[[Sequence[nn.Parameter], float], object]
Half = Callable[[Sequence[nn.Parameter]], object]

FACTOR = 0.5  # what `scale` multiplies by: exact, and undone by a multiplication by 2

_KERNELS = {"cuda": cuda, "triton": triton, "cpu": cpu}
_MOST_TO_COMPILE = 300  # tensors: torch.compile takes minutes for longer lists


@dataclass(frozen=True)
class Contestant:
    clip: Clip
    measure: Half | None = None
    scale: Half | None = None


def contestants(device: torch.device) -> dict[str, Contestant]:
    """Who can run here, by name; "fusedclip" is what serves ``device`` unasked."""
    found = {
        "torch": Contestant(nn.utils.clip_grad_norm_, _torch_measure, _torch_scale),
        "fusedclip": _fusedclip("auto"),
    }
    own = serving(device)
    if own == "reference":
        raise RuntimeError(f"no kernels of fusedclip's run on {device}: {_reasons()}")
    if own != "triton" and "triton" in _on(device):
        found["fusedclip triton"] = _fusedclip("triton")
    for name, load in _PEERS.items():
        try:
            found[name] = Contestant(load())
        except ImportError:
            continue
    return found


def serving(device: torch.device) -> str:
    """The backend that takes gradients on ``device`` unasked."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    one = torch.zeros(1, device=device)
    (part,) = gather([one], select.resolve("auto"), from_parameters=False).parts
    return next((name for name, own in _KERNELS.items() if part.backend is own), "reference")


def _on(device: torch.device) -> list[str]:
    """The backends that can be asked for by name there."""
    names = [name for name, state in select.available_backends().items() if state == "ok"]
    return [n for n in names if n != "reference" and not select.resolve(n).refusal(device)]


def _reasons() -> str:
    return "; ".join(f"{n}: {state}" for n, state in select.available_backends().items())


def _fusedclip(backend: str) -> Contestant:
    def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> object:
        return fusedclip.clip_(parameters, max_norm, backend=backend)

    # The kernels' own halves: the drop-ins for torch's are made of the whole clip.
    def measure(parameters: Sequence[nn.Parameter]) -> object:
        (part,) = gather(list(parameters), select.resolve(backend)).parts
        out = torch.empty(1, dtype=torch.float64, device=part.device)
        part.backend.measure(part, None, infinity=False, out=out)
        return out

    def scale(parameters: Sequence[nn.Parameter]) -> object:
        (part,) = gather(list(parameters), select.resolve(backend)).parts
        factor = _on_device(FACTOR, torch.float64, part.device).reshape(1)
        part.backend.scale_(part, None, factor)
        return None

    return Contestant(clip, measure, scale)


def _torch_measure(parameters: Sequence[nn.Parameter]) -> object:
    return nn.utils.get_total_norm(gradients_of(parameters))


def _torch_scale(parameters: Sequence[nn.Parameter]) -> object:
    grads = gradients_of(parameters)
    torch._foreach_mul_(grads, _on_device(FACTOR, torch.float32, grads[0].device))
    return None


@functools.cache
def _on_device(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def compiled(tensors: int) -> dict[str, Contestant]:
    """torch's clip and the same under torch.compile; none for a list that takes minutes."""
    if tensors > _MOST_TO_COMPILE:
        return {}
    return {
        "torch": Contestant(nn.utils.clip_grad_norm_),
        "torch.compile": Contestant(_compiled()),
    }


def _compiled() -> Clip:
    def clip(grads: list[Tensor], max_norm: Tensor) -> Tensor:
        norm = nn.utils.get_total_norm(grads)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor)
        return norm

    torch._dynamo.reset()
    compiled = torch.compile(clip, dynamic=False)

    def run(parameters: Sequence[nn.Parameter], max_norm: float) -> object:
        grads = gradients_of(parameters)
        # A number would be compiled in.
        return compiled(grads, _on_device(max_norm, torch.float32, grads[0].device))

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
