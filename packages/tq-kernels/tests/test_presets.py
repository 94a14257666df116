"""Presets: sizes, names of others, errors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels.presets import PRESETS, PresetWarning, find_preset, nearest_preset


def test_bytes_follow_the_bits() -> None:
    for preset in PRESETS.values():
        for dim in (64, 128, 256):
            assert preset.slot_bytes(dim) == dim * (preset.k_bits + preset.v_bits) // 8 + 4
            slot = preset.slot_bytes(dim)
            assert preset.bits_per_number(dim) == 8 * slot / (2 * dim)
            fmt = preset.format(dim, 32)
            assert (fmt.k_bits, fmt.v_bits, fmt.page_size) == (preset.k_bits, preset.v_bits, 32)
            assert fmt.scale == "unbiased"
    assert [p.slot_bytes(128) for p in PRESETS.values()] == [260, 196, 132, 116, 100, 84, 68]


def test_ratio_counts_layers_kept_at_16_bits() -> None:
    tq4 = PRESETS["tq4"]
    assert tq4.ratio(32, 128) == pytest.approx(512 / 132)
    assert tq4.bytes_per_token(32, 8, 128) == 32 * 8 * 132
    kept = replace(tq4, skip_layers=(0, 1, -2, -1))
    assert kept.skipped(32) == {0, 1, 30, 31}
    assert kept.bytes_per_token(32, 8, 128) == 8 * (4 * 512 + 28 * 132)
    assert kept.ratio(32, 128) == pytest.approx(32 * 512 / (4 * 512 + 28 * 132))
    with pytest.raises(TQError, match="none is left"):
        kept.bytes_per_token(4, 8, 128)


@pytest.mark.parametrize("name", list(PRESETS))
def test_own_names_do_not_warn(name: str) -> None:
    preset = PRESETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_preset(name) is preset
        assert find_preset(f" {name.upper()} ") is preset
        assert find_preset(f"k{preset.k_bits}v{preset.v_bits}") is preset
        assert nearest_preset(preset.k_bits, preset.v_bits) is preset


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("turboquant_k8v4", "tq8v4"),
        ("turboquant_4bit_nc", "tq4"),
        ("turboquant_k3v4_nc", "tq4v3"),
        ("turboquant_3bit_nc", "tq3"),
        ("tq2.5", "tq3v2"),
    ],
)
def test_names_of_others_warn(name: str, own: str) -> None:
    with pytest.warns(PresetWarning, match=own):
        assert find_preset(name) is PRESETS[own]


@pytest.mark.parametrize(("name", "hint"), [("tq44", "'tq4'"), ("fp8", "choose one of tq8")])
def test_unknown_names_are_errors(name: str, hint: str) -> None:
    with pytest.raises(TQError, match=hint):
        find_preset(name)


@given(st.integers(1, 8), st.integers(1, 8))
def test_the_nearest_preset_has_enough_bits(k_bits: int, v_bits: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PresetWarning)
        found = nearest_preset(k_bits, v_bits)
    assert found.k_bits >= k_bits
    assert found.v_bits >= v_bits
    for other in PRESETS.values():
        if other.k_bits >= k_bits and other.v_bits >= v_bits:
            assert other.slot_bytes(128) >= found.slot_bytes(128)


@pytest.mark.parametrize("bits", [0, 9, True, 4.0])
def test_bits_out_of_range_are_errors(bits: object) -> None:
    with pytest.raises(TQError, match="1 to 8"):
        nearest_preset(bits, 4)  # type: ignore[arg-type]
