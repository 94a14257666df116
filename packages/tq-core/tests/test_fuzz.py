"""Bytes from outside: everything decodes to finite numbers or raises TQError."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import (
    Encoded,
    MSEQuantizer,
    PageLayout,
    TQError,
    decode_record,
    encode_record,
    pack_bits,
    unpack_bits,
)

LAYOUTS = st.builds(
    PageLayout,
    st.sampled_from([16, 48, 128]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 32]),
)


@settings(max_examples=150)
@given(LAYOUTS, st.data())
def test_any_record_decodes_or_raises(layout: PageLayout, data: st.DataObject) -> None:
    size = layout.record_bytes + data.draw(st.sampled_from([0, 0, 0, 0, -1, 1, -7]))
    kind = data.draw(st.sampled_from(["uint8", "uint8", "uint8", "int8", "float32"]))
    seed = data.draw(st.integers(0, 2**32))
    record = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, max(0, size - 2)))
        record[at : at + 2] = data.draw(st.sampled_from([(0, 0x7C), (255, 255), (0, 0x7E)]))
    scales = record[layout.k_scale_offset : layout.record_bytes]
    whole = size == layout.record_bytes and kind == "uint8"
    good = whole and bool(np.isfinite(scales.view("<f2")).all())
    if not good:
        with pytest.raises(TQError, match=f"{size}|finite"):
            decode_record(record.astype(kind), layout)
        return
    k, v = decode_record(record, layout)
    assert k.shape == v.shape == (layout.page_size, layout.head_dim)
    assert np.isfinite(k).all() and np.isfinite(v).all()


@given(LAYOUTS, st.integers(0, 2**32))
def test_flipped_bits_of_codes_stay_inside_their_token(layout: PageLayout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (layout.page_size, layout.head_dim)
    record = encode_record(rng.normal(size=shape), rng.normal(size=shape), layout)
    before = decode_record(record, layout)
    at = int(rng.integers(0, layout.k_scale_offset))
    record[at] ^= 1 << int(rng.integers(0, 8))
    changed = [
        np.flatnonzero(np.any(a != b, axis=1))
        for a, b in zip(before, decode_record(record, layout), strict=True)
    ]
    assert sorted(map(len, changed)) == [0, 1]


@given(st.binary(max_size=40), st.integers(-1, 10), st.integers(-2, 80))
def test_any_packed_bytes_unpack_or_raise(data: bytes, bits: int, count: int) -> None:
    array = np.frombuffer(data, dtype=np.uint8)
    try:
        codes = unpack_bits(array, bits, count)
    except TQError:
        assert not 1 <= bits <= 8 or count < 0 or len(data) != -(-count * bits // 8)
        return
    assert codes.shape == (count,) and int(codes.max(initial=0)) < 2**bits
    unused = 8 * len(data) - count * bits
    kept = array.copy()
    if unused and len(kept):
        kept[-1] &= 0xFF >> unused
    np.testing.assert_array_equal(pack_bits(codes, bits), kept)


@pytest.mark.parametrize(
    ("data", "scales"),
    [
        (np.zeros((3, 4), np.uint8), np.zeros(4)),
        (np.zeros((4, 5), np.uint8), np.zeros(4)),
        (np.zeros((4, 4), np.int16), np.zeros(4)),
        (np.zeros((4, 4), np.uint8), np.zeros(())),
    ],
)
def test_codes_that_do_not_fit_their_scales(data: np.ndarray, scales: np.ndarray) -> None:
    with pytest.raises(TQError, match="need uint8"):
        MSEQuantizer(8, 4).decode(Encoded(data, scales, 8, 4))
