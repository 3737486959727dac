"""A list of gradients as a table of chunks: plain host code, which needs no Triton.

The table is one int64 vector, a row of four words for each chunk and then the number of the first
chunk of each segment:

    rows     [num_chunks, ROW]   address (16 divides it), begin, end (elements from there),
                                 segment << DTYPE_BITS | dtype
    starts   [num_segments + 1]
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedclip.aliasing import Extent, each_once
from fusedclip.backends.reference import DTYPES

CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
DTYPE_BITS = (len(CODES) - 1).bit_length()
ROW = 4  # one 32-byte sector of memory

_VECTOR_BYTES = 16
_ITEM_SIZES = tuple(dtype.itemsize for dtype in CODES)  # by code

Span = tuple[int, int, torch.dtype]  # address, number of elements


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the gradients of a list are: disjoint, each listed once. Equal only to itself."""

    addresses: tuple[int, ...]
    numels: tuple[int, ...]
    codes: tuple[int, ...]
    kept: tuple[int, ...]  # their positions in the list that was given
    total_bytes: int
    has_float64: bool
    has_empty: bool


@dataclass(frozen=True, eq=False)
class Table:
    """The table in host memory (pinned, where it goes to a device)."""

    words: Tensor  # int64 [ROW · num_chunks + num_segments + 1]
    num_chunks: int


@functools.lru_cache(maxsize=16)
def spans_of(listed: tuple[Span, ...], deduplicate: bool) -> Spans:
    """The same object for the same list, so that what is derived from it is found again.

    With ``deduplicate`` a gradient that is listed again is dropped.

    Raises:
        Overlap: with ``deduplicate``, gradients share memory in part.
    """
    kept = list(range(len(listed)))
    if deduplicate:
        # All empty gradients are kept: each has a norm of its own.
        kept = each_once(
            [
                Extent(span if span[1] else i, span[0], span[1] * span[2].itemsize)
                for i, span in enumerate(listed)
            ]
        )
    addresses, numels, dtypes = zip(*(listed[i] for i in kept), strict=True)
    codes = tuple(CODES[dtype] for dtype in dtypes)
    total = sum(n * _ITEM_SIZES[code] for n, code in zip(numels, codes, strict=True))
    return Spans(addresses, numels, codes, tuple(kept), total, torch.float64 in dtypes, 0 in numels)


@functools.lru_cache(maxsize=16)
def lay_out(
    spans: Spans,
    segments: tuple[int, ...] | None,
    num_segments: int,
    chunk_bytes: int,
    pinned: bool,
) -> Table:
    """The table of ``spans`` cut into chunks of ``chunk_bytes``.

    Chunks are cut from the border of 16 bytes at or before a tensor's first element, and ordered by
    segment (``None``: all are of segment 0).
    """
    with torch.device("cpu"), torch.inference_mode(False):
        address, numel = torch.tensor(spans.addresses), torch.tensor(spans.numels)
        code = torch.tensor(spans.codes)
        segment = torch.zeros_like(code) if segments is None else torch.tensor(segments)
        order = torch.argsort(segment, stable=True)
        order = order[segment[order] >= 0]  # what counts towards no norm is left alone
        address, numel, code, segment = (t[order] for t in (address, numel, code, segment))
        item = torch.tensor(_ITEM_SIZES)[code]
        base = address - address % _VECTOR_BYTES
        begin = (address - base) // item
        end = torch.where(numel > 0, begin + numel, 0)
        per_chunk = chunk_bytes // item
        count = (end + per_chunk - 1) // per_chunk
        entry = torch.repeat_interleave(count)
        nth = torch.arange(len(entry)) - (count.cumsum(0) - count)[entry]
        rows = torch.stack(
            [
                base[entry] + nth * chunk_bytes,
                torch.where(nth == 0, begin[entry], 0),
                torch.minimum(end[entry] - nth * per_chunk[entry], per_chunk[entry]),
                segment[entry] << DTYPE_BITS | code[entry],
            ],
            dim=1,
        )
        chunks = torch.zeros(num_segments + 1, dtype=torch.int64)
        chunks[1:].index_add_(0, segment, count)
        words = torch.cat([rows.flatten(), chunks.cumsum(0)])
        return Table(words.pin_memory() if pinned else words, len(entry))
