"""A list of gradients as a table of chunks: plain host code, which needs no Triton.

The table is one int64 vector, a row of four words for each chunk and then the number of the first
chunk of each segment:

    rows     [num_chunks, ROW]   address (16 divides it), begin, end (elements from there),
                                 segment << DTYPE_BITS | dtype
    starts   [num_segments + 1]
"""

import functools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedclip.backends.reference import DTYPES

CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
DTYPE_BITS = (len(CODES) - 1).bit_length()
SPAN = 3  # words of a gradient
ROW = 4  # one 32-byte sector of memory

_VECTOR_BYTES = 16
_ITEM_SIZES = tuple(dtype.itemsize for dtype in CODES)  # by code


@dataclass(frozen=True, eq=False)
class Table:
    """The table in host memory (pinned, where it goes to a device)."""

    words: Tensor  # int64 [ROW · num_chunks + num_segments + 1]
    num_chunks: int


def pack(spans: Iterable[tuple[int, int, torch.dtype]]) -> bytes:
    """Addresses, numbers of elements and dtypes as ``lay_out`` takes them."""
    return array(
        "q", [n for at, numel, dtype in spans for n in (at, numel, CODES[dtype])]
    ).tobytes()


@functools.lru_cache(maxsize=16)
def lay_out(
    spans: bytes,
    segments: tuple[int, ...] | None,
    num_segments: int,
    chunk_bytes: int,
    pinned: bool,
) -> Table:
    """The table of ``spans`` cut into chunks of ``chunk_bytes``; the same object for the same ones.

    ``spans`` is int64 ``[len, SPAN]``: address, number of elements, code of its dtype. Chunks are
    cut from the border of 16 bytes at or before a tensor's first element, and ordered by segment
    (``None``: all are of segment 0).
    """
    with torch.device("cpu"), torch.inference_mode(False):
        words = torch.tensor(array("q", spans), dtype=torch.int64)
        address, numel, code = words.view(-1, SPAN).unbind(1)
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
