"""Measure, decide and scale: one cooperative launch, or two where a grid has no barrier (a long
list, a device without such grids or one that refuses it).

Chunks are dealt to the programs in turn. Each chunk's total goes to a slot of its own; after the
barrier every program adds up all slots in the same order, so that all programs come to the same
decision, and none has to send it to the others. Then each walks its chunks backwards: what was read
last is still in cache.
"""

import struct

import triton
import triton.language as tl
from torch import Tensor, float64

from fusedclip.backends.native import NONFINITE

from . import table as layout
from .chunks import chunk_total, magnitude_bits, scale_chunk
from .launch import ROWS, SLOTS, THREADS, Work, is_refusal, launch

_SLOTS = tl.constexpr(SLOTS)
_SLOTS_AT_ONCE = tl.constexpr(1024)

_ROW = tl.constexpr(layout.ROW)
_DTYPE_MASK = tl.constexpr(2**layout.DTYPE_BITS - 1)

# By number: enum class Nonfinite in csrc/semantics.h.
_ZERO, _ERROR = tl.constexpr(NONFINITE["zero"]), tl.constexpr(NONFINITE["error"])
_UNCLIPPED = tl.constexpr(NONFINITE["unclipped"])
MEASURE_ONLY = len(NONFINITE)  # no decision
_MEASURE_ONLY = tl.constexpr(MEASURE_ONLY)
# Flags: what the list holds, and which pointers are given.
ANY_FLOAT64, INV_SCALE, MAX_NORM, FOUND_INF = 1, 2, 4, 8
_ANY_FLOAT64, _INV_SCALE = tl.constexpr(ANY_FLOAT64), tl.constexpr(INV_SCALE)
_MAX_NORM, _FOUND_INF = tl.constexpr(MAX_NORM), tl.constexpr(FOUND_INF)


@triton.jit(
    do_not_specialize=[
        "table_ptr", "scratch_ptr", "num_chunks", "totals_ptr", "num_totals", "norm_ptr",
        "found_inf_ptr", "inv_scale_ptr", "max_norm_ptr", "max_norm_bits", "nonfinite",
        "flags",
    ],
    do_not_specialize_on_alignment=[
        "table_ptr", "scratch_ptr", "totals_ptr", "norm_ptr", "found_inf_ptr", "inv_scale_ptr",
        "max_norm_ptr",
    ],
)  # fmt: skip
def _clip_kernel(
    table_ptr,  # int64, as table.py describes it
    scratch_ptr,  # int64 counter of the barrier, fp64 [num_chunks] slots
    num_chunks: tl.int32,
    totals_ptr,  # fp64 [num_totals], of the table's segments
    num_totals: tl.int32,
    norm_ptr,  # fp64 with _ANY_FLOAT64, else fp32
    found_inf_ptr,  # fp32
    inv_scale_ptr,  # fp32
    max_norm_ptr,  # fp64
    max_norm_bits: tl.int64,  # the number, where no pointer is given; as a float it would be fp32
    nonfinite: tl.int32,
    flags: tl.int32,
    MAXIMUM: tl.constexpr,
    MEASURE: tl.constexpr,
    FINISH: tl.constexpr,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    barrier_ptr = scratch_ptr.to(tl.pointer_type(tl.int64))
    slots_ptr = (barrier_ptr + _SLOTS).to(tl.pointer_type(tl.float64))
    inv_scale = _given(inv_scale_ptr, flags & _INV_SCALE, tl.full([], 1.0, tl.float32))
    if MEASURE:
        _measure_mine(table_ptr, slots_ptr, num_chunks, inv_scale, MAXIMUM, THREADS, ROWS)
    if MEASURE and FINISH:
        _wait_for_all(barrier_ptr)
    if FINISH:
        starts_ptr = table_ptr + num_chunks.to(tl.int64) * _ROW
        for i in range(tl.program_id(0), num_totals, tl.num_programs(0)):
            begin, end = tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)
            tl.store(totals_ptr + i, _slot_total(slots_ptr, begin, end, MAXIMUM))
        if nonfinite != _MEASURE_ONLY:
            total = _slot_total(slots_ptr, 0, num_chunks, MAXIMUM)
            norm = _publish_norm(total, norm_ptr, found_inf_ptr, flags, MAXIMUM)
            number = max_norm_bits.to(tl.int64).to(tl.float64, bitcast=True)
            max_norm = _given(max_norm_ptr, flags & _MAX_NORM, number)
            factor, zero = _decide(norm, max_norm, nonfinite, inv_scale)
            if factor != 1.0:
                _scale_mine(table_ptr, num_chunks, factor, zero, THREADS, ROWS)


@triton.jit
def _given(ptr, given, default):
    """The value behind a pointer that may be another's, of any type, when it is not given."""
    return tl.load(ptr.to(tl.pointer_type(default.dtype)), given != 0, other=default)


@triton.jit
def _measure_mine(
    table_ptr, slots_ptr, num_chunks, inv_scale,
    MAXIMUM: tl.constexpr, THREADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    step = tl.num_programs(0)
    address, begin, end, tag = load_row(table_ptr, tl.program_id(0), num_chunks)
    for chunk in range(tl.program_id(0), num_chunks, step):
        # The next row comes while this chunk is summed.
        next_address, next_begin, next_end, next_tag = load_row(table_ptr, chunk + step, num_chunks)
        dtype = tag & _DTYPE_MASK
        total = chunk_total(address, begin, end, dtype, inv_scale, MAXIMUM, THREADS, ROWS)
        tl.store(slots_ptr + chunk, total)
        address, begin, end, tag = next_address, next_begin, next_end, next_tag


@triton.jit
def load_row(table_ptr, chunk, num_chunks):
    """(address, begin, end, tag) of a chunk; past the last one, of any."""
    last = tl.maximum(num_chunks - 1, 0)  # a list of empty gradients has no row, but some memory
    row_ptr = table_ptr + tl.minimum(chunk, last).to(tl.int64) * _ROW
    begin, end = tl.load(row_ptr + 1).to(tl.int32), tl.load(row_ptr + 2).to(tl.int32)
    return tl.load(row_ptr), begin, end, tl.load(row_ptr + 3)


@triton.jit
def _wait_for_all(barrier_ptr):
    """Every program of the grid has come here, and what it wrote before can be read.

    The upper half of the counter is the number of barriers passed: program 0 adds what the ones of
    all others leave to 2^32. So it need not be reset, and any grid may follow any other.
    """
    tl.debug_barrier()  # of this program's threads
    others = tl.num_programs(0).to(tl.int64) - 1
    step = tl.where(tl.program_id(0) == 0, (1 << 32) - others, 1)
    passed = tl.atomic_add(barrier_ptr, step, sem="acq_rel") >> 32
    while (tl.atomic_add(barrier_ptr, 0, sem="acquire") >> 32) == passed:
        pass
    tl.debug_barrier()


@triton.jit
def _slot_total(slots_ptr, begin, end, MAXIMUM: tl.constexpr):
    """The total of slots [begin, end), in the same order in every program."""
    sums = tl.zeros([_SLOTS_AT_ONCE], tl.float64)
    peaks = tl.zeros([_SLOTS_AT_ONCE], tl.int64)
    for start in range(begin, end, _SLOTS_AT_ONCE):
        at = start + tl.arange(0, _SLOTS_AT_ONCE)
        # Other programs wrote them: not from this multiprocessor's own cache.
        values = tl.load(slots_ptr + at, at < end, other=0.0, cache_modifier=".cg")
        if MAXIMUM:
            peaks = tl.maximum(peaks, magnitude_bits(values))
        else:
            sums += values
    if MAXIMUM:
        total = tl.max(peaks).to(tl.float64, bitcast=True)
    else:
        total = tl.sum(sums)
    return total


@triton.jit
def _publish_norm(total, norm_ptr, found_inf_ptr, flags, MAXIMUM: tl.constexpr):
    """NormOf of csrc/semantics.h: what the user is given, and what the decision is made from."""
    norm = total if MAXIMUM else tl.sqrt(total)
    first = tl.program_id(0) == 0
    if (flags & _ANY_FLOAT64) != 0:
        tl.store(norm_ptr.to(tl.pointer_type(tl.float64)), norm, first)
    else:
        rounded = norm.to(tl.float32)
        tl.store(norm_ptr.to(tl.pointer_type(tl.float32)), rounded, first)
        norm = rounded.to(tl.float64)
    found = first & ((flags & _FOUND_INF) != 0) & (norm - norm != 0.0)
    tl.store(found_inf_ptr.to(tl.pointer_type(tl.float32)), 1.0, found)
    return norm


@triton.jit
def _decide(norm, max_norm, nonfinite, inv_scale):
    """Decide of csrc/semantics.h: the fp64 factor, and whether zeros are written instead."""
    coefficient = max_norm / (norm + 1e-6)
    coefficient = tl.where((coefficient > 1.0) | (max_norm == float("inf")), 1.0, coefficient)
    bad = norm - norm != 0.0
    coefficient = tl.where(bad & (nonfinite == _UNCLIPPED), 1.0, coefficient)
    zero = bad & (nonfinite == _ZERO)
    factor = tl.where(zero, 0.0, inv_scale.to(tl.float64) * coefficient)
    return tl.where(bad & (nonfinite == _ERROR), 1.0, factor), zero


@triton.jit
def _scale_mine(table_ptr, num_chunks, factor, zero, THREADS: tl.constexpr, ROWS: tl.constexpr):
    step = tl.num_programs(0)
    num_mine = tl.cdiv(num_chunks - tl.program_id(0), step)
    for k in range(num_mine):
        chunk = tl.program_id(0) + (num_mine - 1 - k) * step
        address, begin, end, tag = load_row(table_ptr, chunk, num_chunks)
        scale_chunk(address, begin, end, tag & _DTYPE_MASK, factor, zero, THREADS, ROWS)


def clip(
    work: Work,
    *,
    maximum: bool,
    nonfinite: str | None,
    totals: Tensor | None = None,
    num_totals: int = 0,
    norm: Tensor | None = None,
    max_norm: float | Tensor = 0.0,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Launch it on the current stream. All tensors are on the device.

    Args:
        maximum: max|g| instead of Σ|g|².
        nonfinite: what a NaN or infinite norm does; ``None`` writes ``totals`` and no gradient.
        totals: fp64 ``[num_totals]``, Σ|g|² or max|g| of the table's first ``num_totals`` segments.
        norm: fp64 scalar when any gradient is fp64, else fp32; by its dtype the norm is rounded.
        max_norm: the threshold, a number or an fp64 scalar.
        inv_scale: fp32 scalar, multiplied into every value.
        found_inf: fp32 scalar, set to 1 when the norm is not finite.
    """
    number, limit = (0.0, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)
    flags = (
        ANY_FLOAT64 * (norm is not None and norm.dtype == float64)
        | INV_SCALE * (inv_scale is not None)
        | MAX_NORM * (limit is not None)
        | FOUND_INF * (found_inf is not None)
    )
    # A pointer that is not given is the table's: one signature, one compiled kernel.
    totals, norm, found_inf, inv_scale, limit = (
        work.table if tensor is None else tensor
        for tensor in (totals, norm, found_inf, inv_scale, limit)
    )
    arguments = (
        work.table, work.scratch, work.num_chunks, totals, num_totals, norm, found_inf, inv_scale,
        limit, int.from_bytes(struct.pack("<d", number), "little", signed=True),
        MEASURE_ONLY if nonfinite is None else NONFINITE[nonfinite], flags,
    )  # fmt: skip

    def run(measure: bool, finish: bool, *, cooperative: bool = False) -> None:
        constants = (maximum, measure, finish, THREADS, ROWS)
        launch(_clip_kernel, work, arguments, constants, cooperative)

    if work.place.cooperative:
        try:
            return run(True, True, cooperative=True)
        except RuntimeError as error:
            if not is_refusal(error):
                raise
    run(True, False)
    run(False, True)
