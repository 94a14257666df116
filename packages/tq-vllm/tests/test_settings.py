from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat
from tq_kernels.presets import PRESETS
from tq_vllm.settings import asked_for, load_settings, named_layers


def test_import_loads_no_framework() -> None:
    code = "import sys, tq_vllm; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.key_bits, settings.value_bits) == (4, 4)
    assert (settings.skip_layers, settings.fine_layer_names) == ("none", "none")
    assert (settings.prefill, settings.seed) == ("exact", 0)
    assert settings.scale_name == KVFormat(128).scale
    assert not settings.singles_out_layers
    assert not asked_for({})
    assert not asked_for({"TQ_K_BITS": "", "TQ_KERNELS_DEBUG": "1", "PATH": "x"})
    assert asked_for({"TQ4_V_BITS": "4"})


@pytest.mark.parametrize("scale", ["norm", "unbiased"])
def test_scale(monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    monkeypatch.setenv("TQ_SCALE", scale)
    assert load_settings().scale_name == scale


@pytest.mark.parametrize("name", PRESETS)
def test_presets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    preset = PRESETS[name]
    assert preset.skip_layers == ()  # the backend takes none from presets
    monkeypatch.setenv("TQ_PRESET", f" {name.upper()}")
    settings = load_settings()
    assert (settings.preset, settings.key_bits) == (name, preset.k_bits)
    assert settings.value_bits == preset.v_bits
    assert settings.fine_layer_names == ("0,1,-2,-1" if preset.k_bits <= 3 else "none")
    monkeypatch.setenv("TQ_PRESET", f"k{preset.k_bits}v{preset.v_bits}")
    assert load_settings().preset == name


def test_bits_override_the_preset_and_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_PRESET", "k3v3")
    monkeypatch.setenv("TQ_K_BITS", "4")
    settings = load_settings()
    assert (settings.key_bits, settings.value_bits, settings.fine_layer_names) == (4, 3, "none")
    monkeypatch.setenv("TQ_FINE_LAYERS", "2")
    assert load_settings().fine_layer_names == "2"


def test_the_older_names_of_bits_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ4_K_BITS", "8")
    monkeypatch.setenv("TQ4_V_BITS", " 3")
    settings = load_settings()
    assert (settings.key_bits, settings.value_bits) == (8, 3)
    monkeypatch.setenv("TQ_K_BITS", "8")
    assert load_settings().key_bits == 8
    monkeypatch.setenv("TQ_K_BITS", "4")
    with pytest.raises(TQError, match="TQ_K_BITS=4 and TQ4_K_BITS=8 differ"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TQ_K_BITS", "5", "TQ_K_BITS=5: .*2, 3, 4 or 8"),
        ("TQ4_V_BITS", "four", "TQ4_V_BITS='four'"),
        ("TQ_PRESET", "k4", "TQ_PRESET='k4': .*choose one of .*tq4"),
        ("TQ_PREFILL", "fast", "TQ_PREFILL='fast': .*'exact' or 'stored'"),
        ("TQ_SEED", "-1", "TQ_SEED='-1'"),
        ("TQ_ROTATION", "none", "TQ_ROTATION='none'"),
        ("TQ_SKIP_LAYERS", "first", "'first' names no layers.*0-3"),
        ("TQ_SKIP_LAYERS", "5-3", "'5-3' is no range"),
        ("TQ_KBITS", "4", "TQ_KBITS is no setting.*did you mean TQ_K_BITS"),
        ("TQ_ZZZZZZZ", "4", "TQ_ZZZZZZZ is no setting.*known are TQ_"),
    ],
)
def test_wrong_settings_name_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TQError, match=message):
        load_settings()


def test_layers() -> None:
    assert named_layers("none", 4) == (frozenset(), False)
    assert named_layers("0, 1,-2,-1", 6) == (frozenset({0, 1, 4, 5}), False)
    assert named_layers("1-3,sliding", 6) == (frozenset({1, 2, 3}), True)
    for text in ("6", "-7", "4-6"):
        with pytest.raises(TQError, match="layers 0 to 5"):
            named_layers(text, 6)


@given(st.sets(st.integers(-12, 11)))
def test_layers_are_what_indexing_a_list_gives(numbers: set[int]) -> None:
    layers, _ = named_layers(",".join(map(str, numbers)), 12)
    assert layers == {list(range(12))[n] for n in numbers}
