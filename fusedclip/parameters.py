"""What users pass as ``parameters``: as a list, and by their names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Parameters = Tensor | Iterable[Tensor] | nn.Module | torch.optim.Optimizer


def parameter_list(parameters: Parameters) -> Sequence[Tensor]:
    """``parameters`` as a list or tuple: a tensor, an iterable, a module or an optimizer.

    Of an optimizer without the groups that it keeps apart.
    """
    if isinstance(parameters, (list, tuple)):
        return parameters
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    if isinstance(parameters, torch.optim.Optimizer):
        return [p for g in parameters.param_groups if is_clipped(g) for p in g["params"]]
    if isinstance(parameters, Iterable):
        return list(parameters)
    raise TypeError(
        "parameters: expected a Tensor, an iterable of Tensors, an nn.Module or an Optimizer, "
        f"got {type(parameters).__name__}"
    )


class Named(list[Tensor]):
    """Parameters with their names, picked from a container that knows them."""

    def __init__(self, tensors: Iterable[Tensor], names: Sequence[str]) -> None:
        super().__init__(tensors)
        self.names = list(names)


def is_clipped(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group counts: not with the key ``"clip": False``."""
    return group.get("clip") is not False


def all_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Its parameters, those of the groups that it keeps apart too."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def kept_apart(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of the groups with ``"clip": False``: neither counted nor scaled."""
    return [p for g in optimizer.param_groups if not is_clipped(g) for p in g["params"]]


def gradients_of(tensors: Sequence[Tensor], from_parameters: bool) -> list[Tensor]:
    """The gradients that there are; the tensors themselves where they are gradients."""
    if not from_parameters:
        return list(tensors)
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def parameter_names(parameters: Parameters) -> list[str] | None:
    """The names of all in the order of ``parameter_list``, where the container knows them."""
    if isinstance(parameters, nn.Module):
        return [name for name, _ in parameters.named_parameters()]
    if isinstance(parameters, Named):
        return parameters.names
    if isinstance(parameters, torch.optim.Optimizer):
        groups = [group for group in parameters.param_groups if is_clipped(group)]
        if all("param_names" in group for group in groups):
            return [name for group in groups for name in group["param_names"]]
    return None


def names_in(module: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    """The name that ``module`` has for each of ``tensors``, else its place in the list.

    A parameter is known by itself and by its gradient.
    """
    names = known_names(module)
    return [names.get(id(tensor), f"parameters[{i}]") for i, tensor in enumerate(tensors)]


def known_names(module: nn.Module) -> dict[int, str]:
    """The names of the parameters, by ``id`` of the parameter and of its gradient."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        name = name.replace("_fsdp_wrapped_module.", "")  # which FSDP1 puts in front of each level
        names[id(parameter)] = name
        if parameter.grad is not None:
            names[id(parameter.grad)] = name
    return names


def check_types(tensors: Sequence[Tensor]) -> None:
    """Raises TypeError, naming the entry, unless all are tensors."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            hint = (
                "; pass parameters(), not named_parameters()" if isinstance(tensor, tuple) else ""
            )
            raise TypeError(
                f"parameters[{i}]: expected a Tensor, got {type(tensor).__name__}{hint}"
            )
