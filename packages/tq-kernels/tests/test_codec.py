from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_core import PageLayout, TQError, pack_keys, pack_record, pack_values, unpack_record
from tq_kernels.codec import (
    field_dims,
    pack_codes,
    plane_bytes,
    slot_offsets,
    split_records,
    unpack_codes,
)

DIMS = st.sampled_from(range(16, 257, 16))
BITS = st.sampled_from([2, 3, 4, 8])
SEEDS = st.integers(0, 2**32)


@given(DIMS, BITS, st.integers(1, 3), SEEDS)
def test_bytes_are_those_of_tq_core(dim: int, bits: int, quads: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(2, 4 * quads, dim), dtype="u1")
    keys = pack_codes(torch.from_numpy(codes), bits, "k")
    for plane, expected in zip(keys, pack_keys(codes, bits), strict=True):
        np.testing.assert_array_equal(plane.numpy(), expected)
    values = pack_codes(torch.from_numpy(codes), bits, "v")
    for plane, expected in zip(values, pack_values(codes, bits), strict=True):
        # Byte i of token t of a quad is byte 4 i + t of the row.
        rows = plane.numpy().reshape(2, quads, 4, -1).swapaxes(-1, -2).reshape(2, quads, -1)
        np.testing.assert_array_equal(rows, expected)
    for kind, planes in (("k", keys), ("v", values)):
        assert tuple(p.shape[-1] for p in planes) == plane_bytes(bits, dim)
        np.testing.assert_array_equal(unpack_codes(planes, bits, kind).numpy(), codes)


@given(DIMS, BITS, BITS, st.sampled_from([16, 32, 64, 128]), SEEDS)
def test_records_are_those_of_tq_core(
    dim: int, k_bits: int, v_bits: int, page: int, seed: int
) -> None:
    layout = PageLayout(dim, k_bits, v_bits, page)
    rng = np.random.default_rng(seed)
    k = rng.integers(0, 2**k_bits, size=(3, page, dim), dtype="u1")
    v = rng.integers(0, 2**v_bits, size=(3, page, dim), dtype="u1")
    k_scales, v_scales = rng.normal(size=(2, 3, page)).astype(np.float16)
    records = pack_record(k, v, k_scales, v_scales, layout)

    parts = split_records(torch.from_numpy(records), layout)
    np.testing.assert_array_equal(unpack_codes(parts[0], k_bits, "k").numpy(), k)
    np.testing.assert_array_equal(parts[1].numpy(), k_scales)
    np.testing.assert_array_equal(unpack_codes(parts[2], v_bits, "v").numpy(), v)
    np.testing.assert_array_equal(parts[3].numpy(), v_scales)

    offsets = slot_offsets(layout)
    assert torch.equal(offsets.flatten().sort().values, torch.arange(layout.record_bytes))
    tokens = [
        *(p.numpy() for p in pack_codes(torch.from_numpy(k), k_bits, "k")),
        *(p.numpy() for p in pack_codes(torch.from_numpy(v), v_bits, "v")),
        k_scales[..., None].view(np.uint8),
        v_scales[..., None].view(np.uint8),
    ]
    scattered = np.zeros_like(records)
    scattered[:, offsets.numpy()] = np.concatenate(tokens, axis=-1)
    np.testing.assert_array_equal(scattered, records)
    for part, back in zip((k, v), unpack_record(scattered, layout)[:2], strict=True):
        np.testing.assert_array_equal(part, back)


def test_split_of_one_plane_is_a_view() -> None:
    layout = PageLayout(64, 4, 4)
    records = torch.zeros(2, layout.record_bytes, dtype=torch.uint8)
    keys = split_records(records, layout)[0][0]
    records[1, 0] = 7
    assert keys[1, 0, 0] == 7


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_dimension_has_one_field(kind: str, width: int) -> None:
    for dim in range(16, 257, 16):
        table = field_dims(kind, width, dim)
        assert table.shape == (dim * width // 8, 8 // width)
        assert sorted(table.flatten().tolist()) == list(range(dim))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_on_any_device(bits: int, any_device: str) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 48), dtype=torch.uint8)
    for kind in ("k", "v"):
        planes = pack_codes(codes.to(any_device), bits, kind)
        assert all(p.device.type == any_device for p in planes)
        for plane, expected in zip(planes, pack_codes(codes, bits, kind), strict=True):
            assert torch.equal(plane.cpu(), expected)
        assert torch.equal(unpack_codes(planes, bits, kind).cpu(), codes)


def test_errors() -> None:
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    with pytest.raises(TQError, match="kind='q'"):
        pack_codes(codes, 4, "q")  # type: ignore[arg-type]
    with pytest.raises(TQError, match="bits=5"):
        pack_codes(codes, 5, "k")
    with pytest.raises(TQError, match=r"torch\.int64.*uint8"):
        pack_codes(codes.long(), 4, "k")
    with pytest.raises(TQError, match="1 planes: 3 bits have 2"):
        unpack_codes((codes,), 3, "k")
