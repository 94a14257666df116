from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

typer_testing = pytest.importorskip("typer.testing", reason="tq plan needs the extra cli")

from tq_core import TQError  # noqa: E402
from tq_core.cli import build_app  # noqa: E402
from tq_vllm.capacity import ModelShape, capacity, formats, read_config  # noqa: E402
from tq_vllm.plan_command import parse_bytes  # noqa: E402

LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GIB = 2**30


def run(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(build_app(), ["plan", *arguments])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_a_llama_of_8b() -> None:
    shape = ModelShape.from_config(LLAMA)
    assert (shape.kv_heads, shape.head_dim, len(shape.layers)) == (8, 128, 32)
    found = {f.name: capacity(shape, f, 16 * GIB, 8192) for f in formats()}
    slots = {"bf16": 512, "fp8": 256, "tq8": 260, "tq8v4": 196, "tq4": 132, "tq4v3": 116}
    slots |= {"tq3": 100, "tq3v2": 84, "tq2": 68}
    assert {name: c.slot_bytes for name, c in found.items()} == slots
    for name in ("bf16", "fp8", "tq8", "tq8v4", "tq4", "tq4v3"):
        token = slots[name] * 8 * 32
        assert found[name].token_bytes == token
        assert found[name].requests == 16 * GIB // (token * 8192)
        assert found[name].longest == min(131072, 16 * GIB // token)
        assert found[name].ratio == pytest.approx(512 / slots[name])
    for name in ("tq3", "tq3v2", "tq2"):  # four layers with 8-bit keys and 4-bit values
        assert found[name].token_bytes == (28 * slots[name] + 4 * 196) * 8


def test_sliding_windows_and_other_layers() -> None:
    kinds = ["sliding_attention", "full_attention", "linear_attention", "full_attention"]
    config = LLAMA | {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 1024}
    shape = ModelShape.from_config({"text_config": config})
    assert (shape.layers, shape.numbers) == ((1024, None, None), (0, 1, 3))
    (k4v4,) = (f for f in formats(4, 4) if f.name == "k4v4")
    found = capacity(shape, k4v4, GIB, 4096)
    assert found.token_bytes == 2 * 132 * 8
    assert found.window_bytes == 1024 * 132 * 8
    assert found.requests == GIB // (132 * 8 * (2 * 4096 + 1024))
    kept = capacity(shape, formats(4, 4, "sliding,3")[-1], GIB, 4096)
    assert kept.token_bytes == (132 + 512) * 8
    assert kept.window_bytes == 1024 * 512 * 8


@given(st.integers(0, 2**40), st.sampled_from(formats()), st.integers(1, 10**6))
def test_the_longest_context_fits_and_no_longer_one_does(size: int, fmt: Any, window: int) -> None:
    kinds = ["sliding_attention", "full_attention"] * 16
    config = LLAMA | {"layer_types": kinds, "sliding_window": window}
    found = capacity(ModelShape.from_config(config), fmt, size, 1)

    def need(tokens: int) -> int:
        full = found.token_bytes * tokens
        return full + found.window_bytes * min(tokens, window) // window

    assert need(found.longest) <= size
    assert found.longest == 131072 or need(found.longest + 1) > size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"num_hidden_layers": None}, "none of num_hidden_layers"),
        ({"layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
    ],
)
def test_other_caches_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TQError, match=message):
        ModelShape.from_config(LLAMA | change)


def test_sizes() -> None:
    assert parse_bytes("80GiB") == 80 * GIB
    assert parse_bytes(" 1.5 GB") == 1_500_000_000
    assert parse_bytes("7") == 7
    for text in ("80G", "GiB", "-1GiB", ""):
        with pytest.raises(TQError, match="no size"):
            parse_bytes(text)


def test_table(llama: Path) -> None:
    out = run(str(llama), "--gpu-memory", "80GiB", "--weights", "16GB")
    assert out.exit_code == 0
    for name in ("bf16", "fp8", "tq8v4", "tq4", "tq3", "tq2"):
        assert name in out.output


def test_json(llama: Path) -> None:
    out = run(str(llama / "config.json"), "--k-bits", "4", "--v-bits", "3", "--json")
    assert out.exit_code == 0
    data = json.loads(out.output)
    assert [f["format"]["name"] for f in data["formats"]] == ["bf16", "fp8", "k4v3"]
    assert data["cache_bytes"] == int(80 * GIB * 0.9)
    assert data["formats"][2]["token_bytes"] == 116 * 8 * 32


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="tq plan needs the extra cli")
    errors = pytest.importorskip("huggingface_hub.errors")

    def download(model: str, file: str) -> str:
        if model != "some/llama":
            raise errors.LocalEntryNotFoundError("no connection\nand more")
        return str(llama / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert read_config("some/llama") == LLAMA
    with pytest.raises(TQError, match=r"'some/other' is no file .* \(no connection\); name a"):
        read_config("some/other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "80G"], "80GiB or"),
        (["--weights", "90GiB"], "nothing is left"),
        (["--v-bits", "5"], "v_bits=5"),
        (["--skip-layers", "40"], "layers 0 to"),
    ],
)
def test_wrong_options(llama: Path, options: list[str], message: str) -> None:
    out = run(str(llama), *options)
    assert out.exit_code == 2
    assert message in " ".join(out.output.replace("│", " ").split())


def test_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TQError, match="no configuration of a model"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(TQError, match="no configuration of a model"):
        read_config(str(tmp_path))
