from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_core import HaarRotation, HadamardRotation, PageLayout, TQError, lloyd_max
from tq_kernels import KVFormat

BITS = st.sampled_from([2, 3, 4, 8])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"head_dim": 0}, "head_dim=0.*multiples of 16"),
        ({"head_dim": 72}, "head_dim=72"),
        ({"head_dim": 272}, "head_dim=272"),
        ({"head_dim": -16}, "head_dim=-16"),
        ({"head_dim": 128.0}, "head_dim=128.0.*int"),
        ({"head_dim": "128"}, "head_dim='128'.*int"),
        ({"head_dim": True}, "head_dim=True.*int"),
        ({"k_bits": 5}, "k_bits=5.*2, 3, 4, 8"),
        ({"k_bits": 0}, "k_bits=0"),
        ({"v_bits": 1}, "v_bits=1"),
        ({"v_bits": 16}, "v_bits=16"),
        ({"v_bits": None}, "v_bits=None"),
        ({"page_size": 8}, "page_size=8.*multiple of 16"),
        ({"page_size": 24}, "page_size=24"),
        ({"page_size": 0}, "page_size=0"),
        ({"page_size": -16}, "page_size=-16"),
        ({"rotation": "wht"}, "rotation='wht'.*'hadamard'"),
        ({"rounds": 0}, "rounds=0.*at least 1"),
        ({"rounds": 2.5}, "rounds=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"seed": np.float64(1)}, "seed="),
        ({"scale": "max"}, "scale='max'.*'mse'"),
    ],
)
def test_invalid_formats_cannot_be_built(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(TQError, match=match):
        KVFormat(**{"head_dim": 128, **arguments})  # type: ignore[arg-type]


@given(st.sampled_from(range(16, 257, 16)), BITS, BITS, st.sampled_from([16, 32, 64, 128]))
def test_sizes_are_those_of_the_layout(dim: int, k_bits: int, v_bits: int, page: int) -> None:
    fmt = KVFormat(dim, k_bits, v_bits, page)
    assert fmt.layout == PageLayout(dim, k_bits, v_bits, page)
    assert fmt.slot_bytes == dim * (k_bits + v_bits) // 8 + 4
    assert fmt.record_bytes == page * fmt.slot_bytes
    assert fmt.k_codebook is lloyd_max(dim, k_bits, "int8" if k_bits == 8 else "int7")
    assert fmt.v_codebook is lloyd_max(dim, v_bits, "int8" if v_bits == 8 else "int7")


def test_is_a_frozen_value() -> None:
    fmt = KVFormat(64, 3, 2)
    assert fmt == KVFormat(64, 3, 2) and hash(fmt) == hash(KVFormat(64, 3, 2))
    assert fmt != KVFormat(64, 3, 2, seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.k_bits = 4  # type: ignore[misc]


@pytest.mark.parametrize("dim", [16, 80, 128])
def test_rotation_matrix_is_the_one_of_tq_core(dim: int, any_device: str) -> None:
    for fmt, core in (
        (KVFormat(dim, seed=5, rounds=2), HadamardRotation(dim, 5, 2)),
        (KVFormat(dim, seed=5, rotation="haar"), HaarRotation(dim, 5)),
    ):
        matrix = fmt.rotation_matrix(any_device, torch.float64)
        assert matrix.device.type == any_device
        np.testing.assert_array_equal(matrix.cpu().numpy(), core.matrix)
        single = fmt.rotation_matrix(any_device)
        assert single.dtype == torch.float32 and single is fmt.rotation_matrix(any_device)
        np.testing.assert_array_equal(single.cpu().numpy(), core.matrix.astype(np.float32))


def test_allocated_pages(any_device: str) -> None:
    fmt = KVFormat(80, 3, 4, 32)
    pages = fmt.allocate_pages(5, 2, any_device)
    assert pages.shape == (5, 2, fmt.record_bytes) and pages.dtype == torch.uint8
    assert pages.device.type == any_device and not pages.any()
    assert fmt.allocate_pages(0, 1).numel() == 0
    for arguments in ((-1, 1), (1, 0)):
        with pytest.raises(TQError, match="num_pages="):
            fmt.allocate_pages(*arguments)
