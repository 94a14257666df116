# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
"""Which tokens of a 64-token tile each lane takes, and the loads of their codes and scales.

Lane ``4 g + t`` (group ``g`` 0-7) scores 8 keys, a quarter of each, and weighs 16 values. A load
asks for one key of every group at once. The caches fetch lines of 128 bytes, and a row of 4-bit
keys of 128 dimensions has 64, so that neighbouring groups take neighbouring rows: ``SPREAD`` rows
share a line.

    SPREAD 1: key ``i`` is token ``8 g + i``
    SPREAD 2: token ``16 (g div 2) + g mod 2 + 2 i``
    SPREAD 4: token ``16 (g div 4) + g mod 4 + 32 (i div 4) + 4 (i mod 4)``

Values are tokens ``16 t`` to ``16 t + 15``, in quads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tq_kernels.nvidia.lanes import load, pick_bytes, shuffle

__all__ = [
    "fetch_values",
    "first_key",
    "key_offset",
    "load_tile_keys",
    "load_tile_values",
    "pages_of_tile",
    "rows_of_a_line",
    "to_value_lanes",
]


def rows_of_a_line(head_dim: int, k_bits: int) -> int:
    """``SPREAD`` for keys of a format: rows that a line of 128 bytes holds, at most 4."""
    row = head_dim * (2 if k_bits == 3 else k_bits) // 8  # of 3 bits, those of the larger plane
    return max(1, min(4, 128 // row))


@triton.jit
def first_key(tile, lane_g, SPREAD: tl.constexpr):
    """First of the 8 tokens that a lane scores."""
    BLOCK: tl.constexpr = 8 * SPREAD if SPREAD < 4 else 16
    return tile * 64 + lane_g // SPREAD * BLOCK + lane_g % SPREAD


@triton.constexpr_function
def key_offset(i: int, spread: int) -> int:
    """How far token ``i`` of a lane is from its first."""
    return 32 * (i // 4) + 4 * (i % 4) if spread == 4 else spread * i


@triton.jit
def pages_of_tile(
    block_table, tile, last_page, lane_g, lane_t, SPREAD: tl.constexpr, PAGE: tl.constexpr
):
    """Pages of the first and the last 4 keys of a lane, and of its values; past the end the last."""
    token = first_key(tile, lane_g, SPREAD)
    first = tl.load(block_table + tl.minimum(token // PAGE, last_page))
    second = first
    if SPREAD == 4:
        second = tl.load(block_table + tl.minimum((token + 32) // PAGE, last_page))
    values = tl.load(block_table + tl.minimum((tile * 64 + lane_t * 16) // PAGE, last_page))
    return first, second, values


@triton.jit
def _record(pages, page, page_stride):
    """Address of the record of a head on each lane's page."""
    return pages + page.to(tl.int64) * page_stride


@triton.jit
def _load_key(
    record, token, shift, lane_t, BITS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):
    """Words of one token's row that belong to lane ``t``: nibble-words ``t D/32 ...``."""
    NW: tl.constexpr = D // 32
    if BITS == 3:
        low = record + token * (D // 4) + lane_t * (2 * NW)
        high = record + PAGE * D // 4 + token * (D // 8) + lane_t * NW // 4 * 4
        words = load(low, NW // 2)
        upper = load(high, max(1, NW // 4))
        if NW < 4:
            return words + (upper[0] >> shift,)
        else:
            return words + upper
    else:
        return load(record + token * (D * BITS // 8) + lane_t * (NW * BITS), NW * BITS // 4)


@triton.jit
def _load_quad(
    record, quad, shift, lane_g, BITS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):
    """Words of one quad for lane ``g``: rows ``g`` and ``g + 8`` of every fragment."""
    NW: tl.constexpr = D // 32
    if BITS == 3:
        low = record + quad * D + lane_g * (2 * NW)
        high = record + PAGE * D // 4 + quad * (D // 2) + lane_g * NW // 4 * 4
        first = load(low, NW // 2)
        second = load(low + D // 2, NW // 2)
        high_first = load(high, max(1, NW // 4))
        high_second = load(high + D // 4, max(1, NW // 4))
        if NW < 4:
            return first + (high_first[0] >> shift,) + second + (high_second[0] >> shift,)
        else:
            return first + high_first + second + high_second
    else:
        start = record + quad * (D * BITS // 2) + lane_g * (NW * BITS)
        return load(start, NW * BITS // 4) + load(start + D * BITS // 4, NW * BITS // 4)


@triton.jit
def _two_halves(address):
    """16 bits at each lane's byte address, and 16 bits 8 bytes behind them."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 x, y; ld.global.nc.b16 x, [$1]; ld.global.nc.b16 y, [$1 + 8]; "
        "mov.b32 $0, {x, y}; }",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _fetch(address):
    """Ask the L2 cache for the line at each lane's address."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_scales(records, token, SPREAD: tl.constexpr, PAGE: tl.constexpr):
    """Scales of the 8 tokens that a lane scores, two a word, from the addresses of the scales."""
    if SPREAD == 1:
        return load(records[0] + token % PAGE * 2, 4)
    elif SPREAD == 2:
        words = load(records[0] + (token - token % 2) % PAGE * 2, 8)
        selector = tl.where(token % 2 == 1, 0x7632, 0x5410)
        return (
            pick_bytes(words[0], words[1], selector),
            pick_bytes(words[2], words[3], selector),
            pick_bytes(words[4], words[5], selector),
            pick_bytes(words[6], words[7], selector),
        )
    else:
        first = records[0] + token % PAGE * 2
        second = records[1] + (token + 32) % PAGE * 2
        return (
            _two_halves(first),
            _two_halves(first + 16),
            _two_halves(second),
            _two_halves(second + 16),
        )


@triton.jit
def load_tile_keys(
    pages,
    found,
    tile,
    lane_g,
    lane_t,
    page_stride,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Words and scales of the 8 keys of a lane."""
    token = first_key(tile, lane_g, SPREAD)
    records = (_record(pages, found[0], page_stride), _record(pages, found[1], page_stride))
    shift = (lane_t & 1) * 2
    keys = ()
    for i in tl.static_range(8):
        if SPREAD == 4:
            inside = (token + 32 * (i // 4)) % PAGE + i % 4 * 4
        else:
            inside = token % PAGE + SPREAD * i
        keys = keys + _load_key(records[i // 4], inside, shift, lane_t, K_BITS, D, PAGE)
    behind = PAGE * D * (K_BITS + V_BITS) // 8
    return keys, _load_scales((records[0] + behind, records[1] + behind), token, SPREAD, PAGE)


@triton.jit
def load_tile_values(
    pages,
    found,
    tile,
    lane_g,
    lane_t,
    page_stride,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Words of the 4 quads of values of a lane, and value scales of the tokens of its keys."""
    record = _record(pages, found[2], page_stride) + PAGE * D * K_BITS // 8
    quad = (tile * 64 + lane_t * 16) % PAGE // 4
    shift = (lane_g & 1) * 2
    values = ()
    for i in tl.static_range(4):
        values = values + _load_quad(record, quad + i, shift, lane_g, V_BITS, D, PAGE)
    token = first_key(tile, lane_g, SPREAD)
    records = (_record(pages, found[0], page_stride), _record(pages, found[1], page_stride))
    behind = PAGE * D * (K_BITS + V_BITS) // 8 + PAGE * 2
    return values, _load_scales((records[0] + behind, records[1] + behind), token, SPREAD, PAGE)


@triton.jit
def fetch_values(
    pages,
    found,
    tile,
    lane_g,
    lane_t,
    page_stride,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Ask the L2 cache for the values that `load_tile_values` will load."""
    record = _record(pages, found[2], page_stride) + PAGE * D * K_BITS // 8
    quad = (tile * 64 + lane_t * 16) % PAGE // 4
    QUAD: tl.constexpr = D * (2 if V_BITS == 3 else V_BITS) // 2  # of 3 bits, the larger plane
    for i in tl.static_range((4 * QUAD + 1023) // 1024):
        _fetch(record + quad * QUAD + tl.minimum(lane_g * 128 + i * 1024, 4 * QUAD - 1))


@triton.jit
def _digit(high, low, source, is_high):
    """Word ``high`` or, where not ``is_high``, ``low`` of other lanes."""
    return tl.where(is_high, shuffle(high, source), shuffle(low, source))


@triton.jit
def to_value_lanes(high, low, lane, SPREAD: tl.constexpr):
    """Move digits of weights from the lanes of the keys to those of the values.

    ``high`` and ``low`` have a byte for each of a lane's keys, 0-3 and 4-7. Lane ``4 g + t``
    receives digit ``g mod 2`` of row ``g div 2`` for quads 0-3 of its values, a byte a token.
    """
    row = lane // 8
    t = lane % 4
    is_high = (lane // 4) % 2 == 0
    if SPREAD == 1:
        source = 8 * t + row
        return (
            _digit(high[0], low[0], source, is_high),
            _digit(high[1], low[1], source, is_high),
            _digit(high[0], low[0], source + 4, is_high),
            _digit(high[1], low[1], source + 4, is_high),
        )
    elif SPREAD == 2:
        source = 8 * t + row
        out = ()
        for part in tl.static_range(2):
            even = _digit(high[part], low[part], source, is_high)
            odd = _digit(high[part], low[part], source + 4, is_high)
            out = out + (pick_bytes(even, odd, 0x5140), pick_bytes(even, odd, 0x7362))
        return out
    else:
        words = ()
        for n in tl.static_range(4):
            source = 16 * (t % 2) + 4 * n + row
            early = _digit(high[0], low[0], source, is_high)
            late = _digit(high[1], low[1], source, is_high)
            words = words + (tl.where(t < 2, early, late),)
        # from a word for each of 4 neighbouring tokens to one for each quad
        a = pick_bytes(words[0], words[1], 0x5140)
        b = pick_bytes(words[2], words[3], 0x5140)
        c = pick_bytes(words[0], words[1], 0x7362)
        d = pick_bytes(words[2], words[3], 0x7362)
        return (
            pick_bytes(a, b, 0x5410),
            pick_bytes(a, b, 0x7632),
            pick_bytes(c, d, 0x5410),
            pick_bytes(c, d, 0x7632),
        )
