from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import (
    HaarRotation,
    HadamardRotation,
    PageLayout,
    TQError,
    decode_record,
    encode_record,
    lloyd_max,
    pack_keys,
    pack_record,
    pack_values,
    page_codebook,
    unpack_keys,
    unpack_record,
    unpack_values,
)

BITS = st.sampled_from([2, 3, 4, 8])
LAYOUTS = st.builds(
    PageLayout,
    st.sampled_from(range(16, 257, 16)),
    BITS,
    BITS,
    st.sampled_from([16, 32, 48]),
)


# A decoder written from the text of docs/format.md, sections 4 to 6: one bit at a time.


class NaiveRecord:
    def __init__(self, data: bytes, dim: int, k_bits: int, v_bits: int, page: int) -> None:
        self.data, self.dim, self.page = data, dim, page
        self.bits = {"k": k_bits, "v": v_bits}
        self.used: list[int] = []
        self.start = {"k": 0, "v": page * dim * k_bits // 8}

    def bit(self, offset: int, position: int) -> int:
        """Bit ``position`` (least significant first) of the byte string at ``offset``."""
        index = 8 * offset + position
        self.used.append(index)
        return self.data[index // 8] >> (index % 8) & 1

    def nibble_code(self, which: str, row: int, rows: int, words: int, n: int, j: int) -> int:
        """Code j of nibble-word n of a row of ``words`` nibble-words."""
        bits = self.bits[which]
        planes = {2: [2], 3: [2, 1], 4: [4]}[bits]
        offset, shift, code = self.start[which], 0, 0
        for w in planes:
            row_bytes = words * w  # words·w/4 words of 4 bytes
            base = offset + row * row_bytes
            for i in range(w):
                if w == 4:
                    position = 32 * n + 4 * j + i
                elif w == 2:
                    position = 32 * (n // 2) + 4 * j + 2 * (n % 2) + i
                elif words % 4 == 2 and n >= words - 2:
                    m = n - (words - 2)
                    position = 32 * ((words - 2) // 4) + 4 * (j % 4) + 2 * m + j // 4
                else:
                    position = 32 * (n // 4) + 4 * j + n % 4
                code |= self.bit(base, position) << (shift + i)
            offset += rows * row_bytes
            shift += w
        return code

    def key(self, token: int, d: int) -> int:
        if self.bits["k"] == 8:
            base = self.start["k"] + token * self.dim + d
            return sum(self.bit(base, i) << i for i in range(8))
        return self.nibble_code("k", token, self.page, self.dim // 8, d // 8, d % 8)

    def value(self, token: int, d: int) -> int:
        quad, t = divmod(token, 4)
        if self.bits["v"] == 8:
            base = self.start["v"] + quad * 4 * self.dim + 4 * d + t
            return sum(self.bit(base, i) << i for i in range(8))
        return self.nibble_code("v", quad, self.page // 4, self.dim // 2, d // 2, 2 * t + d % 2)

    def scale(self, which: str, token: int) -> float:
        base = self.page * self.dim * (self.bits["k"] + self.bits["v"]) // 8
        base += 2 * token + (2 * self.page if which == "v" else 0)
        self.used += range(8 * base, 8 * base + 16)
        return float(struct.unpack("<e", self.data[base : base + 2])[0])


def random_parts(layout: PageLayout, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shape = (layout.page_size, layout.head_dim)
    return (
        rng.integers(0, 2**layout.k_bits, size=shape),
        rng.integers(0, 2**layout.v_bits, size=shape),
        rng.normal(size=layout.page_size).astype(np.float16),
        rng.normal(size=layout.page_size).astype(np.float16),
    )


@pytest.mark.parametrize(("k_bits", "v_bits"), list(itertools.product((2, 3, 4, 8), repeat=2)))
@pytest.mark.parametrize("dim", [16, 48, 80, 128])
def test_equals_naive_decoder_and_uses_every_bit_once(dim: int, k_bits: int, v_bits: int) -> None:
    layout = PageLayout(dim, k_bits, v_bits, 16)
    k_codes, v_codes, k_scales, v_scales = random_parts(layout, dim)
    record = pack_record(k_codes, v_codes, k_scales, v_scales, layout)
    naive = NaiveRecord(record.tobytes(), dim, k_bits, v_bits, 16)
    for token in range(16):
        assert [naive.key(token, d) for d in range(dim)] == k_codes[token].tolist()
        assert [naive.value(token, d) for d in range(dim)] == v_codes[token].tolist()
        assert naive.scale("k", token) == k_scales[token]
        assert naive.scale("v", token) == v_scales[token]
    assert sorted(naive.used) == list(range(8 * layout.record_bytes))


@settings(max_examples=30)
@given(LAYOUTS, st.lists(st.integers(1, 3), max_size=2), st.integers(0, 2**32))
def test_round_trip(layout: PageLayout, lead: list[int], seed: int) -> None:
    count = math.prod(lead)
    parts = [
        np.stack(column).reshape(*lead, *column[0].shape)
        for column in zip(*(random_parts(layout, seed + i) for i in range(count)), strict=True)
    ]
    record = pack_record(*parts, layout)
    assert record.shape == (*lead, layout.record_bytes) and record.dtype == np.uint8
    for part, back in zip(parts, unpack_record(record, layout), strict=True):
        np.testing.assert_array_equal(part, back)


@given(LAYOUTS)
def test_sizes(layout: PageLayout) -> None:
    d, bits = layout.head_dim, layout.k_bits + layout.v_bits
    assert layout.slot_bytes * 8 == d * bits + 32
    assert layout.record_bytes == layout.page_size * layout.slot_bytes
    end = 0
    for plane in layout.k_planes + layout.v_planes:
        assert plane.offset == end
        end += plane.nbytes
    assert layout.k_scale_offset == end
    assert layout.v_scale_offset == end + 2 * layout.page_size
    assert layout.record_bytes == end + 4 * layout.page_size
    assert sum(p.width for p in layout.k_planes) == layout.k_bits
    assert sum(p.width for p in layout.v_planes) == layout.v_bits


@settings(max_examples=30)
@given(st.sampled_from([16, 80, 96, 256]), BITS, st.integers(1, 5), st.integers(0, 2**32))
def test_planes_round_trip(dim: int, bits: int, quads: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(4 * quads, dim))
    np.testing.assert_array_equal(unpack_keys(pack_keys(codes, bits), bits, dim), codes)
    np.testing.assert_array_equal(unpack_values(pack_values(codes, bits), bits, dim), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_storing_one_token_writes_whole_bytes(bits: int) -> None:
    """No byte of the value planes belongs to two tokens."""
    owner: dict[tuple[int, int], int] = {}
    for token in range(8):
        codes = np.zeros((8, 48), dtype=np.uint8)
        codes[token] = 2**bits - 1
        for p, plane in enumerate(pack_values(codes, bits)):
            for index in np.flatnonzero(plane):
                assert owner.setdefault((p, int(index)), token) == token


@settings(max_examples=20)
@given(
    st.sampled_from([(128, 4, 4), (80, 3, 3), (64, 4, 2), (48, 8, 3)]),
    st.sampled_from(["mse", "norm", "unbiased", "none"]),
    st.sampled_from(["haar", "hadamard"]),
    st.integers(0, 2**32),
)
def test_quantized_page(sizes: tuple[int, int, int], scale: str, kind: str, seed: int) -> None:
    layout = PageLayout(*sizes)
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 2, 16, layout.head_dim)) * 10 ** rng.uniform(-2, 3, (2, 2, 16, 1))
    k[0, 3], v[1, 5] = 0, 0
    rotation = (HaarRotation if kind == "haar" else HadamardRotation)(layout.head_dim, 1)
    record = encode_record(k, v, layout, rotation=rotation, scale=scale)
    decoded = decode_record(record, layout, rotation=rotation)
    for x, back, bits in zip((k, v), decoded, (layout.k_bits, layout.v_bits), strict=True):
        energy = np.sum(x**2, axis=-1)
        error = np.sum((x - back) ** 2, axis=-1)
        assert np.all(error[energy == 0] == 0)
        # At 8 bits most of the error is in the few coordinates beyond the last level, so that the
        # mean of 31 vectors varies.
        ratio = error[energy > 0] / energy[energy > 0]
        expected = page_codebook(layout.head_dim, bits).mse
        assert ratio.mean() < 1.6 * expected + (0.004 if bits == 8 else 0)


def test_scale_is_the_one_of_the_specification() -> None:
    layout = PageLayout(64, 3, 2)
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 16, 64))
    rotation = HadamardRotation(64)
    for scale in ("mse", "norm", "unbiased", "none"):
        record = encode_record(k, v, layout, scale=scale)
        parts = unpack_record(record, layout)
        for x, codes, scales, bits in ((k, *parts[0::2], 3), (v, *parts[1::2], 2)):
            y = x @ rotation.matrix.T
            c = page_codebook(64, bits).centroids[codes]
            yc, cc, yy = (np.sum(a * b, axis=1) for a, b in ((y, c), (c, c), (y, y)))
            exact = {
                "mse": yc / cc,
                "norm": np.sqrt(yy / cc),
                "unbiased": yy / yc,
                "none": np.sqrt(yy),
            }[scale]
            np.testing.assert_array_equal(scales, exact.astype(np.float16))


def test_page_codebooks() -> None:
    assert page_codebook(128, 4) is lloyd_max(128, 4, "int7")
    assert page_codebook(128, 8) is lloyd_max(128, 8, "int8")


def test_largest_scale() -> None:
    layout = PageLayout(16, 4, 4)
    k = np.zeros((16, 16))
    k[:, 0] = 60000.0
    assert np.all(np.isfinite(decode_record(encode_record(k, k, layout), layout)[0]))
    k[7, 0] = 1e6
    with pytest.raises(TQError, match=r"vector \[7\].*65504"):
        encode_record(k, k, layout)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PageLayout(100, 4, 4), "head_dim=100.*multiples of 16"),
        (lambda: PageLayout(272, 4, 4), "head_dim=272"),
        (lambda: PageLayout(128, 5, 4), "k_bits=5.*2, 3, 4, 8"),
        (lambda: PageLayout(128, 4, 1), "v_bits=1"),
        (lambda: PageLayout(128, 4, 4, 8), "page_size=8"),
        (lambda: pack_keys(np.full((4, 16), 4), 2), "code 4 at index"),
        (lambda: pack_keys(np.zeros((4, 16)), 2), "integers"),
        (lambda: pack_values(np.zeros((6, 16), int), 2), "tokens=6"),
        (lambda: pack_keys(np.zeros((4, 24), int), 2), "head_dim=24"),
        (lambda: pack_keys(np.zeros((4, 16), int), 5), "bits=5"),
        (lambda: unpack_record(np.zeros(7, np.uint8), PageLayout(16, 2, 2)), "needs uint8"),
        (
            lambda: encode_record(np.zeros((8, 16)), np.zeros((16, 16)), PageLayout(16, 2, 2)),
            "k has shape",
        ),
        (
            lambda: encode_record(
                np.zeros((16, 16)), np.zeros((16, 16)), PageLayout(16, 2, 2), scale="max"
            ),
            "scale='max'",
        ),
    ],
)
def test_errors(call: object, match: str) -> None:
    with pytest.raises(TQError, match=match):
        call()  # type: ignore[operator]
