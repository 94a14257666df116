"""The committed test vectors are what this package computes, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from tq_core import (
    HaarRotation,
    HadamardRotation,
    PageLayout,
    encode_record,
    pack_record,
    page_codebook,
    unpack_record,
)


def load(vectors: Path, name: str) -> object:
    content = json.loads((vectors / f"{name}.json").read_text(encoding="utf-8"))
    assert content["format"] == "0.1"
    return content[name]


def test_codebooks(vectors: Path) -> None:
    entries = load(vectors, "codebooks")
    assert len(entries) == 16 * 4
    for key, entry in entries.items():
        dim, bits = map(int, key.split("/"))
        book = page_codebook(dim, bits)
        assert book.grid == entry["grid"]
        assert book.step == float.fromhex(entry["step"])
        assert book.levels.tolist() == entry["levels"]


def test_rotations(vectors: Path) -> None:
    for entry in load(vectors, "rotations"):
        dim, seed = entry["dim"], int(entry["seed"])
        if entry["kind"] == "hadamard":
            rotation = HadamardRotation(dim, seed, entry["rounds"])
            negative = (rotation.signs.ravel() < 0).astype(np.uint8)
            assert np.packbits(negative, bitorder="little").tobytes().hex() == entry["signs_hex"]
        else:
            rotation = HaarRotation(dim, seed)
        matrix = rotation.matrix + 0.0
        n = min(dim, 4)
        assert [v.hex() for v in (rotation.matrix[:n, :n]).ravel().tolist()] == entry["corner"]
        assert [v.hex() for v in rotation.matrix[-1, :8].tolist()] == entry["last_row"]
        assert hashlib.sha256(matrix.astype("<f8").tobytes()).hexdigest() == entry["sha256"]
        y = np.array([float.fromhex(v) for v in entry["y"]])
        x = np.array(entry["x"], dtype=np.float64)
        if entry["kind"] == "hadamard":
            np.testing.assert_array_equal(rotation.apply(x), y)
        else:  # a matrix product may round differently
            np.testing.assert_allclose(rotation.apply(x), y, atol=1e-12)


def test_pages(vectors: Path) -> None:
    entries = load(vectors, "pages")
    assert any(e["head_dim"] == 80 and e["k_bits"] == 3 for e in entries)
    with np.load(vectors / "pages.npz", allow_pickle=False) as arrays:
        for entry in entries:
            dim, seed = entry["head_dim"], int(entry["seed"])
            layout = PageLayout(dim, entry["k_bits"], entry["v_bits"], entry["page_size"])
            assert layout.slot_bytes == entry["slot_bytes"]
            assert layout.record_bytes == entry["record_bytes"]
            rotation = (
                HaarRotation(dim, seed)
                if entry["rotation"] == "haar"
                else HadamardRotation(dim, seed, entry["rounds"])
            )
            case = {
                key: arrays[f"{entry['name']}_{key}"]
                for key in ("k", "v", "k_codes", "v_codes", "k_scales", "v_scales", "record")
            }
            parts = [case[key] for key in ("k_codes", "v_codes", "k_scales", "v_scales")]
            np.testing.assert_array_equal(pack_record(*parts, layout), case["record"])
            for part, back in zip(parts, unpack_record(case["record"], layout), strict=True):
                np.testing.assert_array_equal(part, back)
            record = encode_record(
                case["k"], case["v"], layout, rotation=rotation, scale=entry["scale"]
            )
            np.testing.assert_array_equal(record, case["record"])
