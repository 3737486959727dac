"""What torch is doing around a call: whether native code may take the gradients' memory.

Native kernels read and write memory behind the back of torch's dispatcher. A mode, a transform or a
tracer would then miss the clip: a trace without it, a fake tensor without data, a norm without a
derivative. While one is active, torch's own operations do the work (``dispatched``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

# torch's flags by their C functions: the public ones around them cost more than all of these.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def native_allowed() -> bool:
    """Whether nothing is active that has to see every operation."""
    return plain_allowed() and not in_transform()


def plain_allowed() -> bool:
    """``native_allowed`` for the one native call of a plain clip, before which nothing is asked.

    A transform wraps its tensors, and wrappers are refused there before anything is touched; so the
    question for transforms can wait until then. Dynamo takes the first term for a constant, and
    looks at nothing else.
    """
    return not (
        is_dynamo_compiling()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or (_function_mode() and not _only_a_default_device())
        or _tracing_state() is not None
    )


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is active: ``vmap``, ``grad``, ``functionalize``."""
    return _transforms() is not None


def _only_a_default_device() -> bool:
    """Whether all function modes say where new tensors go: ``torch.set_default_device``."""
    modes: list[TorchFunctionMode] = [
        torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())
    ]
    return all(type(mode) is DeviceContext for mode in modes)


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its values: no subclass, no view that negates, no stand-in."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type != "meta"
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_nested
        and not torch._is_zerotensor(tensor)
        and not torch._is_functional_tensor(tensor)
    )


def check_writable(tensors: Sequence[Tensor], from_parameters: bool) -> None:
    """Raises RuntimeError, as torch's operations do, where gradients must not be written.

    The first stands for all: those of one training step are made alike.
    """
    for tensor in tensors:
        first = tensor.grad if from_parameters else tensor
        if first is not None:
            if first.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    "the gradients are inference tensors, which must not be changed outside of "
                    "torch.inference_mode(); clone() them first"
                )
            return
