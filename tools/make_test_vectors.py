"""Write the test vectors of the format specification (``docs/format.md``).

Usage: ``python tools/make_test_vectors.py [folder]``; the default folder is ``tests/vectors``. The
files are part of the specification: they change only together with the version of the format.

- ``codebooks.json``: grid, step and levels of every codebook of the page format.
- ``rotations.json``: signs, matrix entries and SHA-256 of the float64 matrix bytes (row-major,
  little-endian, negative zeros made positive), and one input with its rotated output.
- ``packing.json``: codes and their dense packing, 1 to 8 bits.
- ``pages.npz``: inputs, codes, scales and record bytes of whole pages, with ``pages.json`` naming
  the parameters of every case.

Floats in JSON are C99 hexadecimal strings (``float.fromhex``).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tq_core
from tq_core.pages import PageLayout
from tq_core.rotation import HaarRotation, HadamardRotation, Rotation

HEAD_DIMS = range(16, 257, 16)

# head_dim, k_bits, v_bits, page_size, rotation, rounds, seed, scale
PAGES: list[tuple[int, int, int, int, str, int, int, str]] = [
    (128, 4, 4, 16, "hadamard", 3, 0, "mse"),
    (128, 4, 3, 16, "hadamard", 3, 0, "mse"),
    (128, 3, 3, 16, "hadamard", 3, 7, "norm"),
    (128, 2, 2, 32, "hadamard", 3, 0, "unbiased"),
    (128, 8, 8, 16, "hadamard", 3, 0, "mse"),
    (128, 8, 4, 16, "haar", 3, 1, "mse"),
    (64, 4, 2, 16, "hadamard", 2, 5, "none"),
    (64, 3, 4, 32, "haar", 3, 0, "mse"),
    (80, 3, 3, 16, "hadamard", 3, 0, "mse"),
    (80, 4, 3, 16, "hadamard", 3, 2**64 - 1, "mse"),
    (96, 3, 2, 16, "hadamard", 3, 0, "mse"),
    (112, 3, 8, 48, "hadamard", 4, 3, "unbiased"),
    (16, 3, 3, 16, "hadamard", 1, 0, "mse"),
    (256, 4, 4, 16, "hadamard", 3, 0, "mse"),
]


def hexes(values: Any) -> list[str]:
    return [float(v).hex() for v in np.asarray(values).ravel()]


def make_rotation(kind: str, dim: int, seed: int, rounds: int) -> Rotation:
    return HaarRotation(dim, seed) if kind == "haar" else HadamardRotation(dim, seed, rounds)


def codebooks() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for dim in HEAD_DIMS:
        for bits in (2, 3, 4, 8):
            book = tq_core.page_codebook(dim, bits)
            assert book.step is not None and book.levels is not None
            out[f"{dim}/{bits}"] = {
                "grid": book.grid,
                "step": book.step.hex(),
                "levels": book.levels.tolist(),
            }
    return out


def rotations() -> list[dict[str, Any]]:
    out = []
    cases = [
        ("hadamard", d, s, r)
        for d, s, r in (
            (1, 0, 3),
            (2, 1, 3),
            (3, 0, 3),
            (7, 2, 2),
            (16, 0, 1),
            (64, 0, 3),
            (80, 0, 3),
            (96, 5, 3),
            (112, 0, 4),
            (128, 0, 3),
            (128, 2**64 - 1, 3),
            (240, 0, 3),
            (256, 9, 3),
        )
    ] + [
        ("haar", d, s, 0)
        for d, s in (
            (1, 0),
            (2, 1),
            (3, 0),
            (5, 7),
            (16, 0),
            (64, 0),
            (80, 0),
            (128, 0),
            (128, 2**64 - 1),
            (256, 0),
        )
    ]
    for kind, dim, seed, rounds in cases:
        rotation = make_rotation(kind, dim, seed, rounds)
        matrix = rotation.matrix
        # Small integers in a fixed pattern: exact in every float type.
        x = (np.arange(dim) * 37 % 17 - 8).astype(np.float64)
        entry: dict[str, Any] = {"kind": kind, "dim": dim, "seed": str(seed)}
        if isinstance(rotation, HadamardRotation):
            negative = (rotation.signs.ravel() < 0).astype(np.uint8)
            entry["rounds"] = rounds
            entry["signs_hex"] = np.packbits(negative, bitorder="little").tobytes().hex()
        count = min(dim, 4)
        entry |= {
            "corner": hexes(matrix[:count, :count]),
            "last_row": hexes(matrix[-1, :8]),
            "sha256": hashlib.sha256((matrix + 0.0).astype("<f8").tobytes()).hexdigest(),
            "x": x.astype(int).tolist(),
            "y": hexes(rotation.apply(x)),
        }
        out.append(entry)
    return out


def packing() -> list[dict[str, Any]]:
    rng = np.random.default_rng(20250424)
    out = []
    for bits in range(1, 9):
        for count in (1, 5, 16, 80, 128):
            codes = rng.integers(0, 2**bits, size=count)
            data = tq_core.pack_bits(codes, bits)
            out.append({"bits": bits, "codes": codes.tolist(), "hex": data.tobytes().hex()})
    return out


def pages() -> tuple[list[dict[str, Any]], dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(20250425)
    index, arrays = [], {}
    for n, (dim, k_bits, v_bits, page, kind, rounds, seed, scale) in enumerate(PAGES):
        layout = PageLayout(dim, k_bits, v_bits, page)
        k = (rng.normal(size=(page, dim)) * rng.uniform(0.1, 30, size=(page, 1))).astype(np.float16)
        v = rng.normal(size=(page, dim)).astype(np.float16)
        k[1], v[2] = 0, 0  # zero vectors
        k[3], v[3] = 0, 0
        k[3, 5 % dim], v[3, dim - 1] = 2.0, -0.5  # one-hot vectors
        rotation = make_rotation(kind, dim, seed, rounds)
        record = tq_core.encode_record(k, v, layout, rotation=rotation, scale=scale)
        k_codes, v_codes, k_scales, v_scales = tq_core.unpack_record(record, layout)
        name = f"case{n:02d}"
        index.append(
            {
                "name": name,
                "head_dim": dim,
                "k_bits": k_bits,
                "v_bits": v_bits,
                "page_size": page,
                "rotation": kind,
                "rounds": rounds,
                "seed": str(seed),
                "scale": scale,
                "slot_bytes": layout.slot_bytes,
                "record_bytes": layout.record_bytes,
            }
        )
        for key, array in (
            ("k", k),
            ("v", v),
            ("k_codes", k_codes),
            ("v_codes", v_codes),
            ("k_scales", k_scales),
            ("v_scales", v_scales),
            ("record", record),
        ):
            arrays[f"{name}_{key}"] = array
    return index, arrays


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("tests/vectors")
    folder.mkdir(parents=True, exist_ok=True)
    index, arrays = pages()
    for name, content in (
        ("codebooks", codebooks()),
        ("rotations", rotations()),
        ("packing", packing()),
        ("pages", index),
    ):
        text = json.dumps({"format": "0.1", name: content}, separators=(",", ":"))
        # One entry a line keeps the files readable in a diff.
        text = text.replace("},{", "},\n{").replace('},"', '},\n"')
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(folder / "pages.npz", **arrays)


if __name__ == "__main__":
    main()
