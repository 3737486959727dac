"""Device code for one chunk: its total, and its rescaling.

A chunk is the elements [begin, end) counted from an address that 16 divides. ``begin`` is not 0
only where a tensor starts off such a border, and then less than one vector. Whole 16-byte vectors
are visited as tiles of ``ROWS`` rows with one vector a thread in each; a thread adds up its own
columns. What remains, less than a vector at either end, is one small tile more.
"""

import torch
import triton
import triton.language as tl

from .table import CODES

# The numbers of the dtypes in the table. The last branch of each choice takes all that is left.
_FLOAT32, _FLOAT64 = tl.constexpr(CODES[torch.float32]), tl.constexpr(CODES[torch.float64])
_FLOAT16 = tl.constexpr(CODES[torch.float16])
_INFINITY = tl.constexpr(float("inf"))
# A sum of squares below it may have lost digits to underflow: kSmallestTrustedSum in
# csrc/semantics.h.
_SMALLEST_TRUSTED_SUM = tl.constexpr(2.0**-100)


@triton.jit
def chunk_total(
    address, begin, end, dtype, inv_scale,
    MAXIMUM: tl.constexpr, THREADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ(g·inv_scale)², or max|g·inv_scale| with NaN kept, as an fp64 scalar.

    Products, and their sum over a vector, are in fp32 and go on in fp64. Where that leaves fp32's
    range the chunk is visited again with fp64 products, while it is in cache: a decision for each
    tile would make all threads meet there. A chunk of zeros is left alone.
    """
    sums, peaks, rest = _visit(
        address, begin, end, dtype, inv_scale, tl.float32, MAXIMUM, THREADS, ROWS
    )
    # What threads exchange is three registers, after the branches of the dtypes and not in each:
    # Triton 3.6 and 3.7 load it under a predicate into registers that were never set, and ptxas
    # keeps each of those through the whole loop over chunks. One fp64 sum and one maximum for each
    # dtype and precision made the kernel of 64 registers spill.
    if MAXIMUM:
        total = tl.max(peaks).to(tl.float64, bitcast=True)
    else:
        total = tl.sum(sums) + rest
        any_nonzero = tl.max((peaks != 0).to(tl.int32)) != 0
        lost = (total == _INFINITY) | ((total < _SMALLEST_TRUSTED_SUM) & any_nonzero)
        if lost & (dtype != _FLOAT64):
            sums, peaks, rest = _visit(
                address, begin, end, dtype, inv_scale, tl.float64, MAXIMUM, THREADS, 1
            )
            total = tl.sum(sums) + rest
    return total


@triton.jit
def _visit(
    address, begin, end, dtype, inv_scale,
    PRODUCT: tl.constexpr, MAXIMUM: tl.constexpr, THREADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What each thread found in a chunk: the sum of squares in its whole vectors, and its largest
    magnitude as the bits of an fp64; and the sum of squares of the rest of the chunk."""
    if dtype == _FLOAT32:
        found = _visit_as(
            address, begin, end, inv_scale, tl.float32, PRODUCT, MAXIMUM, THREADS, ROWS
        )
    elif dtype == _FLOAT64:
        found = _visit_as(
            address, begin, end, inv_scale, tl.float64, tl.float64, MAXIMUM, THREADS, ROWS
        )
    elif dtype == _FLOAT16:
        found = _visit_as(
            address, begin, end, inv_scale, tl.float16, PRODUCT, MAXIMUM, THREADS, ROWS
        )
    else:
        found = _visit_as(
            address, begin, end, inv_scale, tl.bfloat16, PRODUCT, MAXIMUM, THREADS, ROWS
        )
    return found


@triton.jit
def _visit_as(
    address, begin, end, inv_scale,
    DTYPE: tl.constexpr, PRODUCT: tl.constexpr, MAXIMUM: tl.constexpr,
    THREADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    VALUE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    BITS: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    grad_ptr = address.to(tl.pointer_type(DTYPE))
    first = tl.cdiv(begin, VECTOR) * VECTOR
    last = end // VECTOR * VECTOR
    sums = tl.zeros([THREADS], tl.float64)
    peaks = tl.zeros([THREADS], BITS)
    rest = tl.full([], 0.0, tl.float64)
    for start in range(0, last, ROWS * THREADS * VECTOR):
        at = start + _tile(ROWS, THREADS * VECTOR)
        values = tl.load(tl.multiple_of(grad_ptr, 16) + at, (at >= first) & (at < last), other=0.0)
        values = tl.reshape(values, [ROWS, THREADS, VECTOR]).to(VALUE) * inv_scale.to(VALUE)
        peaks = tl.maximum(peaks, tl.max(tl.max(magnitude_bits(values), axis=2), axis=0))
        if not MAXIMUM:
            squares = values.to(PRODUCT) * values.to(PRODUCT)
            sums += tl.sum(tl.sum(squares, axis=2).to(tl.float64), axis=0)
    if (begin != first) | (end != last):
        at, valid = _edges(begin, end, first, last, VECTOR)
        values = tl.load(grad_ptr + at, valid, other=0.0).to(VALUE) * inv_scale.to(VALUE)
        peaks = tl.maximum(peaks, tl.max(magnitude_bits(values)))
        wide = values.to(tl.float64)
        rest = tl.sum(wide * wide)
    magnitudes = peaks.to(VALUE, bitcast=True).to(tl.float64)
    return sums, magnitudes.to(tl.int64, bitcast=True), rest


@triton.jit
def scale_chunk(
    address, begin, end, dtype, factor, zero, THREADS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """g ← g·factor, the product in fp32 (fp64 for fp64) rounded once; with ``zero`` g ← 0.

    A factor that is 1 in that precision writes nothing.
    """
    if dtype == _FLOAT32:
        _scale_as(address, begin, end, factor, zero, tl.float32, THREADS, ROWS)
    elif dtype == _FLOAT64:
        _scale_as(address, begin, end, factor, zero, tl.float64, THREADS, ROWS)
    elif dtype == _FLOAT16:
        _scale_as(address, begin, end, factor, zero, tl.float16, THREADS, ROWS)
    else:
        _scale_as(address, begin, end, factor, zero, tl.bfloat16, THREADS, ROWS)


@triton.jit
def _scale_as(
    address, begin, end, wide_factor, zero,
    DTYPE: tl.constexpr, THREADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    VALUE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    grad_ptr = address.to(tl.pointer_type(DTYPE))
    first = tl.cdiv(begin, VECTOR) * VECTOR
    last = end // VECTOR * VECTOR
    factor = wide_factor.to(VALUE)
    if factor != 1.0:
        for start in range(0, last, ROWS * THREADS * VECTOR):
            at = start + _tile(ROWS, THREADS * VECTOR)
            whole = (at >= first) & (at < last)
            _scale_tile(tl.multiple_of(grad_ptr, 16) + at, whole, factor, zero)
        if (begin != first) | (end != last):
            at, valid = _edges(begin, end, first, last, VECTOR)
            _scale_tile(grad_ptr + at, valid, factor, zero)


@triton.jit
def _scale_tile(grad_ptrs, mask, factor, zero):
    stored = tl.load(grad_ptrs, mask)
    scaled = tl.where(zero, 0.0, stored.to(factor.dtype) * factor)
    tl.store(grad_ptrs, scaled.to(stored.dtype), mask)


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [ROWS, COLUMNS] of consecutive elements.

    Of two dimensions: with a third for the vectors, rows and threads would look alike to Triton,
    and 3.6 spreads a warp over the rows, so that their sums go through shuffles. Not of one, whose
    offsets would be those of another dtype's tile: 3.6 then gives both the vectors of the longer.
    """
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _edges(begin, end, first, last, VECTOR: tl.constexpr):
    """The elements of [begin, end) outside of [first, last): offsets and which of them are."""
    lane = tl.arange(0, 2 * VECTOR)
    head = lane < VECTOR
    at = tl.where(head, lane, last + lane - VECTOR)
    return at, tl.where(head, (at >= begin) & (at < first), at >= first) & (at < end)


@triton.jit
def magnitude_bits(values):
    """The bits of |v|. As integers they are ordered as the values are, and NaN is above infinity:
    a maximum that keeps NaN, which ``tl.maximum`` of floats drops."""
    if values.dtype == tl.float64:
        return values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
