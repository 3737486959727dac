"""``FullyShardedDataParallel.clip_grad_norm_`` (FSDP1) clips with fusedclip.

torch's functions on the flat shards of FSDP1 see one rank's part of each gradient, so FSDP1 has a
method of its own, which Accelerate, Transformers, Lightning and others call. ``fusedclip.patch()``
replaces it as soon as torch's FSDP is imported. One fp64 value for each process group that shards
travels, in one all-reduce where there is one such group. The norm is in fp32, and the same on all
ranks that have the same gradients of unsharded parameters.

>>> fusedclip.patch()
>>> grad_norm = model.clip_grad_norm_(1.0)  # the root FullyShardedDataParallel
"""

import contextlib
import functools
import gc
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fusedclip.call import Call, Clipped, listeners
from fusedclip.integrations.after import After, after_import
from fusedclip.integrations.seams import Function, Seam, Seams

_MODULE = "torch.distributed.fsdp.fully_sharded_data_parallel"
_waiting: After | None = None


def patch() -> Seams:
    """Replace it now; also as ``with patch():``. Calling it again changes nothing."""
    listeners.add(_of_shards)
    return _seams.patch()


def patch_when_imported() -> None:
    """Replace it when torch's FSDP is imported, which takes a second."""
    global _waiting
    if _waiting is None and not _seams.active:
        _waiting = after_import(_MODULE, _patch)


def _patch() -> None:
    patch()


def unpatch() -> None:
    """Undo every ``patch()``, exactly; harmless when nothing is patched."""
    global _waiting
    if _waiting is not None and _waiting in sys.meta_path:
        sys.meta_path.remove(_waiting)
    _waiting = None
    listeners.discard(_of_shards)
    _seams.unpatch()


def _clip(original: Function) -> Function:
    del original

    def clip_grad_norm_(self: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        from fusedclip.integrations.torch import limit, skip_above

        fsdp: Any = sys.modules[_MODULE]
        fsdp._lazy_init(self, self)
        if not self._is_root:
            raise RuntimeError(
                "clip_grad_norm_() belongs to the root FullyShardedDataParallel; call it there"
            )
        self._assert_state(fsdp.TrainingState.IDLE)
        mesh_of = dict(_parameters(self))
        meshes = list(mesh_of.values())
        call = Call(
            limit(max_norm),
            float(norm_type),
            skip_above=skip_above(),
            meshes=meshes if any(meshes) else None,
        )
        with _own_clip():
            return call.apply(list(mesh_of))

    return clip_grad_norm_


def _parameters(root: Any) -> Iterator[tuple[Tensor, Any]]:
    """Every parameter, with the mesh over which its gradient is sharded (or None)."""
    managed: set[Tensor] = set()
    for handle in root._all_handles:
        mesh = _mesh_of(handle.process_group) if handle.uses_sharded_strategy else None
        flat = handle.flat_param
        for parameter in flat._params if handle._use_orig_params else [flat]:
            managed.add(parameter)
            yield parameter, mesh
    for parameter in root.parameters():
        if parameter not in managed:
            yield parameter, None


class _OfShards:
    """Listens for clips of flat shards by functions that take them for whole gradients."""

    def __init__(self) -> None:
        self.expected = False  # FSDP's own method clips

    def heard(self, clipped: Clipped) -> None:
        if self.expected or not any(hasattr(t, "_fsdp_flattened") for t in clipped.tensors):
            return
        listeners.discard(self)  # once
        shards = {id(p) for root in _roots() for p, mesh in _parameters(root) if mesh is not None}
        if any(id(tensor) in shards for tensor in clipped.tensors):
            warnings.warn(
                "fusedclip: the parameters of a FullyShardedDataParallel (FSDP1) were clipped by a "
                "function that sees the shards of this rank alone, so the norm is of these and "
                "differs between ranks; call clip_grad_norm_() of the FullyShardedDataParallel "
                "itself",
                stacklevel=5,
            )


_of_shards = _OfShards()


@contextlib.contextmanager
def _own_clip() -> Iterator[None]:
    _of_shards.expected = True
    try:
        yield
    finally:
        _of_shards.expected = False


def _roots() -> Iterator[Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for each in gc.get_objects():
        if issubclass(type(each), FullyShardedDataParallel) and each._is_root:
            yield each


@functools.lru_cache(maxsize=64)
def _mesh_of(group: Any) -> Any:
    """The ranks of ``group``, which makes no new one."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, group._device_types[0].type)


_seams = Seams(
    "fusedclip.integrations.fsdp1",
    [
        Seam(_MODULE, "FullyShardedDataParallel.clip_grad_norm_",
             ("self", "max_norm", "norm_type"), _clip,
             needs=("_lazy_init", "TrainingState")),
    ],
)  # fmt: skip
