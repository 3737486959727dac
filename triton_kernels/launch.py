"""How kernels are launched: the shape of a grid, and the compiled kernel kept at hand.

Triton's own launcher looks at every argument of every call to find the right specialisation. Here
there is one for each kernel, its constants and a device; it is looked up by those and handed the
arguments as they are.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import interpreted

# A tile is 8 rows of one 16-byte vector for each of 256 threads: 32 KiB are in flight, where memory
# with 3 TB/s and 600 ns asks for 14 KiB of each of 132 multiprocessors. 128 registers a thread
# leave half of a multiprocessor's 64 Ki to others. 4 rows for each of 512 threads are the same tile
# and the same half, but what a thread keeps besides values (addresses, the next row of the table,
# what warps exchange) does not shrink with its 64 registers: Triton 3.6 and 3.7 spill on sm_80.
THREADS = 256
ROWS = 8
MAX_REGISTERS = 128

# A chunk is at least one tile. One of 256 KiB takes 11 µs at that rate, its sum over the threads
# and its row of the table about 1.
MIN_CHUNK_BYTES = 32 << 10
MAX_CHUNK_BYTES = 256 << 10
# Chunks are dealt in turn, so the last round is uneven: with 16 rounds by at most a sixteenth.
ROUNDS = 16

# A grid with a barrier must find its places beside others, and one of a long list needs no barrier:
# csrc/cuda/launch_shape.h has the reasons.
MULTIPROCESSORS_PER_SPARE = 8
LONG_BYTES = 2 << 20  # for each program of a short list
LONG_PROGRAMS = 2  # in its place
INTERPRETED_PROGRAMS = 2

# Words of the scratch memory before the slots, one for each chunk: the counter of the barrier.
SLOTS = 1


@dataclass(frozen=True)
class Place:
    """A device and what its grids are like."""

    index: int
    programs: int  # the most of a grid
    cooperative: bool  # whether a grid can have a barrier

    def chunk_bytes(self, total_bytes: int) -> int:
        """The size of chunks for a list: large, unless programs would be idle."""
        size = MIN_CHUNK_BYTES
        while size < MAX_CHUNK_BYTES and 2 * size * self.programs * ROUNDS <= total_bytes:
            size *= 2
        return size

    def for_list(self, total_bytes: int) -> "Place":
        """For a long list twice the programs, in a launch for each phase."""
        if total_bytes < LONG_BYTES * self.programs:
            return self
        return Place(self.index, LONG_PROGRAMS * self.programs, cooperative=False)


@dataclass(frozen=True)
class Work:
    """A list of gradients, ready for a launch."""

    place: Place
    table: Tensor  # int64, from table.lay_out, on the device
    scratch: Tensor  # uint8 [scratch_bytes(num_chunks)], zeros when it is new, on the device
    num_chunks: int


def scratch_bytes(num_chunks: int) -> int:
    return 8 * (SLOTS + num_chunks)


_places: dict[int, Place] = {}


def place_of(index: int) -> Place:
    """The place of GPU ``index``, which is the current device.

    Programs run one after the other in the interpreter, so a barrier would hang there; on devices
    other than CUDA's two launches are used as well.
    """
    place = _places.get(index)
    if place is None:
        if interpreted():
            place = Place(index, INTERPRETED_PROGRAMS, cooperative=False)
        else:
            target = driver.active.get_current_target()
            count = driver.active.utils.get_device_properties(index)["multiprocessor_count"]
            programs = max(1, count - count // MULTIPROCESSORS_PER_SPARE)
            place = Place(index, programs, cooperative=target.backend == "cuda")
        _places[index] = place
    return place


_compiled: dict[tuple[str, int, tuple[int, ...]], Any] = {}


def launch(
    kernel: Any,
    work: Work,
    arguments: tuple[Any, ...],
    constants: tuple[int, ...],
    cooperative: bool = False,
) -> None:
    """Run ``kernel`` on the current device and stream; ``constants`` are its last parameters."""
    grid = (min(max(work.num_chunks, 1), work.place.programs), 1, 1)
    if interpreted():
        kernel[grid](*arguments, *constants)
        return
    key = (kernel.__name__, work.place.index, constants)
    compiled = _compiled.get(key)
    if compiled is None:
        chosen = options(driver.active.get_current_target(), cooperative)
        compiled = kernel.warmup(*arguments, *constants, grid=grid, **chosen)
        _compiled[key] = compiled
    compiled[grid](*arguments, *constants)


# What the driver says of a grid that cannot be resident at once (in a green context, under MPS, on
# a part of a device), and of a device that has no such grids. An ordinary one runs there.
_REFUSALS = (
    "too many blocks in cooperative launch", "operation not supported",
    "too many resources requested for launch",
)  # fmt: skip


def is_refusal(error: RuntimeError) -> bool:
    """Whether nothing was launched since the grid was to be cooperative."""
    return any(text in str(error) for text in _REFUSALS)


def options(target: GPUTarget, cooperative: bool) -> dict[str, Any]:
    """What a kernel is compiled with."""
    chosen = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": True}
    if target.backend == "cuda":
        chosen |= {"maxnreg": MAX_REGISTERS, "launch_cooperative_grid": cooperative}
    return chosen


def current_stream(index: int) -> int:
    """The handle of torch's current stream on GPU ``index``."""
    return 0 if interpreted() else int(driver.active.get_current_stream(index))
