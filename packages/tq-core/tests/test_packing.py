from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError, pack_bits, packed_size, unpack_bits
from tq_core import packing as packing_module

BITS = st.integers(1, 8)


def naive_pack(codes: list[int], bits: int) -> bytes:
    """Specification, section 7, bit by bit."""
    out = bytearray(-(-len(codes) * bits // 8))
    for i, code in enumerate(codes):
        for b in range(bits):
            position = i * bits + b
            out[position // 8] |= (code >> b & 1) << (position % 8)
    return bytes(out)


@given(BITS, st.data())
def test_equals_naive_and_round_trips(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_bits(np.array(codes, dtype=np.int64), bits)
    assert packed.dtype == np.uint8 and packed.tobytes() == naive_pack(codes, bits)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(BITS, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 20))
def test_leading_shapes(bits: int, lead: list[int], count: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, size=(*lead, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*lead, packed_size(count, bits))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


@given(BITS, st.integers(0, 200))
def test_size_has_no_spare_byte(bits: int, count: int) -> None:
    assert 0 <= 8 * packed_size(count, bits) - count * bits < 8


def test_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 8, size=(9, 11))
    whole = pack_bits(codes, 3)
    monkeypatch.setattr(packing_module, "_CHUNK", 25)
    np.testing.assert_array_equal(pack_bits(codes, 3), whole)
    np.testing.assert_array_equal(unpack_bits(whole, 3, 11), codes)


def test_committed_vectors(vectors: Path) -> None:
    cases = json.loads((vectors / "packing.json").read_text())["packing"]
    assert {case["bits"] for case in cases} == set(range(1, 9))
    for case in cases:
        assert pack_bits(case["codes"], case["bits"]).tobytes().hex() == case["hex"]
        assert naive_pack(case["codes"], case["bits"]).hex() == case["hex"]
        data = np.frombuffer(bytes.fromhex(case["hex"]), dtype=np.uint8)
        assert unpack_bits(data, case["bits"], len(case["codes"])).tolist() == case["codes"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pack_bits([0], 0), "bits=0"),
        (lambda: pack_bits([0], 9), "bits=9"),
        (lambda: pack_bits([[0, 1], [8, 0]], 3), r"code 8 at index \(1, 0\).*0 to 7"),
        (lambda: pack_bits([-1], 3), "code -1"),
        (lambda: pack_bits([0.5], 3), "integers"),
        (lambda: pack_bits(3, 3), "scalar"),
        (lambda: unpack_bits(np.zeros(3, np.uint8), 3, 9), "last axis of 4"),
        (lambda: unpack_bits(np.zeros(4), 3, 9), "float64"),
        (lambda: unpack_bits(np.zeros(0, np.uint8), 3, -1), "count=-1"),
    ],
)
def test_errors(call: object, match: str) -> None:
    with pytest.raises(TQError, match=match):
        call()  # type: ignore[operator]
