"""The committed test vectors of the format are read, and reproduced bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tq_kernels import KVFormat, dequantize_ref, rotate_ref, store_ref
from tq_kernels.quantize import quantize

Case = tuple[KVFormat, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def cases(vectors: Path) -> list[Case]:
    entries = json.loads((vectors / "pages.json").read_text(encoding="utf-8"))
    assert entries["format"] == "0.1"
    found = []
    with np.load(vectors / "pages.npz", allow_pickle=False) as arrays:
        for entry in entries["pages"]:
            names = ("k", "v", "k_codes", "v_codes", "k_scales", "v_scales", "record")
            fields = ("head_dim", "k_bits", "v_bits", "page_size", "rotation", "scale")
            fmt = KVFormat(
                **{name: entry[name] for name in fields},
                rounds=entry.get("rounds") or 3,
                seed=int(entry["seed"]),
            )
            assert fmt.record_bytes == entry["record_bytes"]
            found.append((fmt, {n: arrays[f"{entry['name']}_{n}"] for n in names}))
    assert len(found) >= 8
    return found


def test_codebooks(vectors: Path) -> None:
    entries = json.loads((vectors / "codebooks.json").read_text(encoding="utf-8"))["codebooks"]
    for key, entry in entries.items():
        dim, bits = map(int, key.split("/"))
        book = KVFormat(dim, v_bits=bits).v_codebook
        assert book.step == float.fromhex(entry["step"])
        assert book.levels is not None and book.levels.tolist() == entry["levels"]


def test_rotations(vectors: Path) -> None:
    entries = json.loads((vectors / "rotations.json").read_text(encoding="utf-8"))["rotations"]
    checked = 0
    for entry in entries:
        dim = entry["dim"]
        if dim % 16 or not 16 <= dim <= 256:
            continue
        fmt = KVFormat(
            dim, rotation=entry["kind"], seed=int(entry["seed"]), rounds=entry.get("rounds") or 3
        )
        y = np.array([float.fromhex(v) for v in entry["y"]])
        got = rotate_ref(torch.tensor(entry["x"], dtype=torch.float64), fmt).numpy()
        np.testing.assert_allclose(got, y, rtol=0, atol=1e-12 if entry["kind"] == "haar" else 0)
        checked += 1
    assert checked >= 4


def test_pages_are_written(cases: list[Case]) -> None:
    for fmt, case in cases:
        k, v = (torch.from_numpy(case[n]).double()[:, None] for n in ("k", "v"))
        pages = fmt.allocate_pages(1, 1)
        store_ref(k, v, pages, torch.arange(fmt.page_size), fmt)
        np.testing.assert_array_equal(pages[0, 0].numpy(), case["record"])


def test_float32_codes_of_dense_vectors_are_the_same(cases: list[Case]) -> None:
    for fmt, case in cases:
        for kind in ("k", "v"):
            x = case[kind]
            dense = np.count_nonzero(x, axis=-1) > 1
            codes, scales = quantize(torch.from_numpy(x), fmt, kind)
            np.testing.assert_array_equal(codes.numpy()[dense], case[f"{kind}_codes"][dense])
            np.testing.assert_allclose(
                scales.numpy()[dense], case[f"{kind}_scales"][dense], rtol=2**-10
            )


def test_pages_are_read(cases: list[Case]) -> None:
    for fmt, case in cases:
        pages = torch.from_numpy(case["record"])[None, None]
        got = dequantize_ref(pages, torch.arange(fmt.page_size), fmt, torch.float64)
        for x, kind in zip(got, ("k", "v"), strict=True):
            book = fmt.k_codebook if kind == "k" else fmt.v_codebook
            c = book.centroids[case[f"{kind}_codes"]]
            y = c * case[f"{kind}_scales"].astype(np.float64)[:, None]
            np.testing.assert_allclose(
                x[:, 0].numpy(), fmt.core_rotation.inverse(y), rtol=0, atol=1e-11
            )
