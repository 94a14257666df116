# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Codes on their way through shared memory: 16 tokens a step, several tiles in flight.

A warp copies what a step takes of a page with ``cp.async``, which holds no registers, and loads its
words when it needs them. In shared memory a step looks like a record of a page of 16 tokens, but
that quads of values stand `PAD` bytes further apart, so that the quads of four lanes lie on different
banks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tq_kernels.nvidia.ptx import load_shared_words

__all__ = [
    "claim",
    "commit",
    "issue_step",
    "place_of",
    "step_key",
    "step_quad",
    "step_scales",
    "wait",
]

PAD = tl.constexpr(32)
#: Bytes that one instruction of a warp copies.
COPIED = 512


@triton.constexpr_function
def pieces(k_bits: int, v_bits: int, dim: int, page: int) -> dict[str, tuple[int, int, int]]:
    """Pieces of a step: bytes a token, where it starts in a record, where in shared memory."""
    found, source, target = {}, 0, 0
    for name, bits in (("k", k_bits), ("v", v_bits)):
        for plane, width in (("", 2), ("_high", 1)) if bits == 3 else (("", bits),):
            row = dim * width // 8
            found[name + plane] = (row, source, target)
            source += page * row
            target += 16 * row + (4 * PAD.value if name == "v" else 0)
    for name in ("k_scales", "v_scales"):
        found[name] = (2, source, target)
        source += page * 2
        target += 32
    found["end"] = (0, source, target)
    return found


@triton.constexpr_function
def place_of(name: str, k_bits: int, v_bits: int, dim: int) -> int:
    """Where a piece of a step starts in shared memory; "end" is its size."""
    return int(pieces(k_bits, v_bits, dim, 16)[name][2])


@triton.constexpr_function
def _copies(k_bits: int, v_bits: int, dim: int, page: int) -> tuple[str, str]:
    """Copies of all pieces of a step.

    Operands after the result: 1 if wanted; the lane; the lane's source in a record as if the pieces
    of keys and values had no start, for each; its source of scales; its target for keys, for
    each piece of values, and for scales.
    """
    found = pieces(k_bits, v_bits, dim, page)
    names = [name for name in found if "scales" not in name and name != "end"]
    operands = iter(range(3, 100))
    sources = {name: f"${next(operands)}" for name in (*names, "scales")}
    keys = f"${next(operands)}"
    targets = {name: keys if name[0] == "k" else f"${next(operands)}" for name in names}
    targets["scales"] = f"${next(operands)}"
    lines = [".reg .pred p, q;", "setp.ne.u32 p, $1, 0;"]

    def copy(name: str, source: int, target: int, lanes: int) -> None:
        predicate = "p"
        if lanes < 32:
            lines.append(f"setp.lt.and.u32 q, $2, {lanes}, p;")
            predicate = "q"
        lines.append(
            f"@{predicate} cp.async.cg.shared.global "
            f"[{targets[name]}+{target}], [{sources[name]}+{source}], 16;"
        )

    for name in names:
        row, source, target = found[name]
        for at in range(0, 16 * row, COPIED):
            pads = at // (4 * row) * PAD.value if name[0] == "v" else 0
            copy(name, source + at, target + at + pads, min(32, row - at // 16))
    copy("scales", found["k_scales"][1], found["k_scales"][2], 4)
    kinds = ["=r", "r", "r", *["l"] * len(sources), *["r"] * len({*targets.values()})]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, 0;"]) + "\n}", ",".join(kinds)


@triton.constexpr_function
def _claim(size: int) -> str:
    return f"{{ .shared .align 16 .b8 stages[{size}]; mov.u32 $0, stages; }}"


@triton.constexpr_function
def _wait(later: int) -> str:
    return f"cp.async.wait_group {later}; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"


@triton.jit
def claim(lane, BYTES: tl.constexpr):
    """Address of this much shared memory."""
    asm: tl.constexpr = _claim(BYTES)
    return tl.inline_asm_elementwise(asm, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def commit(lane):
    """What was issued since the last time is a group."""
    tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, 0;",
        "=r,r",
        [lane],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait(lane, LATER: tl.constexpr):
    """Until all groups but the last ``LATER`` are there, for all lanes."""
    asm: tl.constexpr = _wait(LATER)
    tl.inline_asm_elementwise(asm, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def issue_step(
    record,
    inside,
    target,
    wanted,
    lane,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Copy 16 tokens from token ``inside`` of a page on, if ``wanted``."""
    asm: tl.constexpr = _copies(K_BITS, V_BITS, D, PAGE)[0]
    constraints: tl.constexpr = _copies(K_BITS, V_BITS, D, PAGE)[1]
    at = record + lane * 16
    to = target + lane * 16
    sources = ()
    targets = (to,)
    for plane in tl.static_range(2 if K_BITS == 3 else 1):
        sources = sources + (
            at + inside * (D // (4 + 4 * plane) if K_BITS == 3 else D * K_BITS // 8),
        )
    for plane in tl.static_range(2 if V_BITS == 3 else 1):
        row = D // (4 + 4 * plane) if V_BITS == 3 else D * V_BITS // 8
        sources = sources + (at + inside * row,)
        targets = targets + (to + lane * 4 // row * PAD,)
    # Two lanes for the scales of keys, two for those of values.
    sources = sources + (at + (inside * 2 + lane // 2 * (2 * PAGE - 32)),)
    operands = (wanted.to(tl.int32), lane) + sources + targets + (to,)
    tl.inline_asm_elementwise(asm, constraints, operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _load(address, COUNT: tl.constexpr):
    asm: tl.constexpr = load_shared_words(COUNT)[0]
    constraints: tl.constexpr = load_shared_words(COUNT)[1]
    return tl.inline_asm_elementwise(
        asm, constraints, [address], dtype=(tl.int32,) * COUNT, is_pure=False, pack=1
    )


@triton.jit
def step_key(step, token, lane_t, K_BITS: tl.constexpr, V_BITS: tl.constexpr, D: tl.constexpr):
    """Words of one token's row that belong to lane ``t``."""
    NW: tl.constexpr = D // 32
    if K_BITS == 3:
        HIGH: tl.constexpr = place_of("k_high", K_BITS, V_BITS, D)
        words = _load(step + token * (D // 4) + lane_t * (2 * NW), NW // 2)
        upper = _load(step + HIGH + token * (D // 8) + lane_t * NW // 4 * 4, max(1, NW // 4))
        if NW < 4:
            return words + (upper[0] >> ((lane_t & 1) * 2),)
        else:
            return words + upper
    else:
        return _load(step + token * (D * K_BITS // 8) + lane_t * (NW * K_BITS), NW * K_BITS // 4)


@triton.jit
def step_quad(step, lane_g, lane_t, K_BITS: tl.constexpr, V_BITS: tl.constexpr, D: tl.constexpr):
    """Words of quad ``t`` for lane ``g``, of both halves of the dimensions."""
    NW: tl.constexpr = D // 32
    PLACE: tl.constexpr = place_of("v", K_BITS, V_BITS, D)
    if V_BITS == 3:
        HIGH: tl.constexpr = place_of("v_high", K_BITS, V_BITS, D)
        low = step + PLACE + lane_t * (D + PAD) + lane_g * (2 * NW)
        high = step + HIGH + lane_t * (D // 2 + PAD) + lane_g * NW // 4 * 4
        first = _load(low, NW // 2)
        second = _load(low + D // 2, NW // 2)
        high_first = _load(high, max(1, NW // 4))
        high_second = _load(high + D // 4, max(1, NW // 4))
        shift = (lane_g & 1) * 2
        if NW < 4:
            return first + (high_first[0] >> shift,) + second + (high_second[0] >> shift,)
        else:
            return first + high_first + second + high_second
    else:
        COUNT: tl.constexpr = NW * V_BITS // 4
        start = step + PLACE + lane_t * (D * V_BITS // 2 + PAD) + lane_g * (NW * V_BITS)
        return _load(start, COUNT) + _load(start + D * V_BITS // 4, COUNT)


@triton.jit
def step_scales(
    step, lane_t, NAME: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, D: tl.constexpr
):
    """Scales of quad ``t``, two a word."""
    PLACE: tl.constexpr = place_of(NAME, K_BITS, V_BITS, D)
    return _load(step + PLACE + 8 * lane_t, 2)
