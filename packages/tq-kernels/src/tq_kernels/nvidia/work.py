# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Which tiles of which pairs a program of the NVIDIA decode kernels attends.

The 64-token tiles of all pairs stand in one list, and every program takes a contiguous range of it,
so that all have the same amount of work whatever the lengths are.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["entries_of_program", "pair_at", "tiles_of_each"]


@triton.jit
def tiles_of(lengths, query_lens, window, WINDOW: tl.constexpr):
    """Number of the first 64-token tile that any query of a sequence sees, and how many follow."""
    tiles = (lengths + 63) // 64
    first = tl.zeros_like(lengths)
    if WINDOW:
        first = tl.maximum(lengths - query_lens - window + 1, 0) // 64
    return first, tiles - first


@triton.jit
def tiles_of_each(
    seq_lens,
    cu_query_lens,
    batch,
    window,
    BATCH_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Tiles of every sequence, 0 past the last."""
    sequences = tl.arange(0, BATCH_BLOCK)
    known = sequences < batch
    lengths = tl.load(seq_lens + sequences, mask=known, other=0)
    query_starts = tl.load(cu_query_lens + sequences, mask=known, other=0)
    query_ends = tl.load(cu_query_lens + sequences + 1, mask=known, other=0)
    _skipped, tiles = tiles_of(lengths, query_ends - query_starts, window, WINDOW)
    return tiles


@triton.jit
def entries_of_program(entries, programs, least):
    """Length of the list, and how many of it a program takes."""
    total = tl.sum(entries, 0)
    return total, tl.maximum((total + programs - 1) // programs, least)


@triton.jit
def pair_at(
    position,
    stop,
    entries,
    ends,
    seq_lens,
    cu_query_lens,
    window,
    BATCH_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """What stands at a position of the list.

    Returns the sequence, its length, its first query, its number of queries, which of its pairs it
    is, the tile, and how many tiles of the pair follow from there on before ``stop``.
    """
    sequences = tl.arange(0, BATCH_BLOCK)
    sequence = tl.sum((ends <= position).to(tl.int32), 0)
    before = tl.sum(tl.where(sequences < sequence, entries, 0), 0)
    length = tl.load(seq_lens + sequence)
    query_start = tl.load(cu_query_lens + sequence)
    query_len = tl.load(cu_query_lens + sequence + 1) - query_start
    skipped, tiles = tiles_of(length, query_len, window, WINDOW)
    inside = (position - before) % tiles
    count = tl.minimum(tiles - inside, stop - position)
    own = (position - before) // tiles
    return sequence, length, query_start, query_len, own, skipped + inside, count
