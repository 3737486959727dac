"""Scaling on its own: each gradient by the coefficient of its segment."""

import triton
import triton.language as tl
from torch import Tensor

from . import table as layout
from .chunks import scale_chunk
from .clip import load_row
from .launch import ROWS, THREADS, Work, launch

_DTYPE_BITS, _DTYPE_MASK = tl.constexpr(layout.DTYPE_BITS), tl.constexpr(2**layout.DTYPE_BITS - 1)


@triton.jit(
    do_not_specialize=["table_ptr", "num_chunks", "coefficients_ptr", "zero_fill"],
    do_not_specialize_on_alignment=["table_ptr", "coefficients_ptr"],
)
def _scale_kernel(
    table_ptr,  # int64, as table.py describes it
    num_chunks: tl.int32,
    coefficients_ptr,  # fp64 [num_segments]
    zero_fill: tl.int32,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        address, begin, end, tag = load_row(table_ptr, chunk, num_chunks)
        coefficient = tl.load(coefficients_ptr + (tag >> _DTYPE_BITS))
        zero = (zero_fill != 0) & (coefficient == 0.0)
        scale_chunk(address, begin, end, tag & _DTYPE_MASK, coefficient, zero, THREADS, ROWS)


def scale(work: Work, *, coefficients: Tensor, zero_fill: bool) -> None:
    """Launch it on the current stream.

    Args:
        coefficients: fp64 ``[num_segments]``, on the device.
        zero_fill: a coefficient of 0 writes zeros over NaN and inf.
    """
    arguments = (work.table, work.num_chunks, coefficients, int(zero_fill))
    launch(_scale_kernel, work, arguments, (THREADS, ROWS))
