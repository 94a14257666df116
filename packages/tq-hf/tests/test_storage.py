"""Saving and loading, and what files that are not right do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.demo_measure import held_bytes
from tq_hf.testing import SMALL_MODEL, feed
from transformers import Gemma2Config, LlamaConfig

SHAPE = SMALL_MODEL | {"head_dim": 80}
LLAMA = LlamaConfig(**SHAPE)
GEMMA = Gemma2Config(**SHAPE, sliding_window=24)


def filled(config: Any = LLAMA, tokens: int = 90, **options: Any) -> TurboQuantCache:
    cache = TurboQuantCache(config, **{"k_bits": 3, "window_tokens": 8, **options})
    torch.manual_seed(0)
    for layer in range(2):
        x = torch.randn(2, 2, tokens, config.head_dim, dtype=torch.bfloat16)
        cache.update(x, x.flip(-1), layer)
    return cache


def same(a: TurboQuantCache, b: TurboQuantCache) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.keys.dtype == theirs.keys.dtype


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
@pytest.mark.parametrize("tokens", [1, 3, 20, 90])
def test_a_loaded_cache_is_the_saved_one(tmp_path: Path, config: Any, tokens: int) -> None:
    cache = filled(config, tokens)
    cache.save(tmp_path / "cache.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "cache.safetensors", config)
    same(cache, loaded)
    # And goes on as the saved one does.
    x = torch.randn(2, 2, 40, 80, dtype=torch.bfloat16)
    for c in (cache, loaded):
        for layer in range(2):
            c.update(x, x, layer)
    same(cache, loaded)
    assert loaded.memory_usage().held_bytes == held_bytes(loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_options_and_centers_come_back(tmp_path: Path) -> None:
    options = {
        "v_bits": 2,
        "sink_tokens": 1,
        "skip_layers": (-1,),
        "layer_bits": {0: (8, 3)},
        "rotation": "haar",
        "seed": 7,
        "scale": "unbiased",
        "key_center": {0: torch.randn(2, 80)},
        "search": True,
    }
    cache = filled(**options)
    cache.save(tmp_path / "c")
    loaded = TurboQuantCache.load(tmp_path / "c", LLAMA)
    same(cache, loaded)
    assert loaded.layers[0].options.fmt == cache.layers[0].options.fmt
    assert torch.equal(loaded.layers[0].key_center, options["key_center"][0])


def test_metrics_are_passed_again(tmp_path: Path) -> None:
    metrics = {i: (torch.eye(80).repeat(2, 1, 1), torch.eye(80).repeat(2, 1, 1)) for i in (0, 1)}
    metrics[0][0][:, 40:] = 0
    cache = filled(search=True, metrics=metrics)
    cache.save(tmp_path / "c")
    with_them = TurboQuantCache.load(tmp_path / "c", LLAMA, metrics=metrics)
    without = TurboQuantCache.load(tmp_path / "c", LLAMA)
    x = torch.randn(2, 2, 40, 80, dtype=torch.bfloat16)
    for c in (cache, with_them, without):
        c.update(x, x, 0)
    assert torch.equal(cache.layers[0].keys, with_them.layers[0].keys)
    assert not torch.equal(cache.layers[0].keys, without.layers[0].keys)


def test_a_file_is_about_as_large_as_the_codes(tmp_path: Path) -> None:
    cache = filled(tokens=1000)
    cache.save(tmp_path / "c")
    usage = cache.memory_usage()
    size = (tmp_path / "c").stat().st_size
    assert 0 <= size - usage.code_bytes - usage.dense_bytes < 8192


def test_an_empty_cache(tmp_path: Path) -> None:
    TurboQuantCache(LLAMA).save(tmp_path / "c")
    assert TurboQuantCache.load(tmp_path / "c", LLAMA).get_seq_length() == 0


def test_a_loaded_cache_does_not_follow_the_file(tmp_path: Path) -> None:
    cache = filled()
    path = tmp_path / "c"
    cache.save(path)
    loaded = TurboQuantCache.load(path, LLAMA)
    with path.open("r+b") as file:
        file.seek(-20000, 2)
        file.write(b"\xff" * 20000)
    same(cache, loaded)


def test_generation_goes_on(tmp_path: Path, trained: Any) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    ids = torch.randint(1, 4096, (1, 130))
    cache = TurboQuantCache(model.config)
    feed(model, ids[:, :100], cache, [100])
    cache.save(tmp_path / "c")
    loaded = TurboQuantCache.load(tmp_path / "c", model.config)
    ours, theirs = (feed(model, ids[:, 100:], c, [1] * 5 + [25]) for c in (loaded, cache))
    assert torch.equal(ours, theirs)


# Damaged files


def rewritten(path: Path, change: Any) -> None:
    """Apply ``change(tensors, metadata)`` to a file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def edit_layer(**entries: Any) -> Any:
    def change(tensors: Any, metadata: Any) -> None:
        layers = json.loads(metadata["layers"])
        layers[0].update(entries)
        metadata["layers"] = json.dumps(layers)

    return change


def edit_options(**entries: Any) -> Any:
    def change(tensors: Any, metadata: Any) -> None:
        metadata["options"] = json.dumps(json.loads(metadata["options"]) | entries)

    return change


def edit_tensor(name: str, function: Any) -> Any:
    def change(tensors: Any, metadata: Any) -> None:
        tensors[name] = function(tensors[name])

    return change


def fill(value: float) -> Any:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[3] = value
        return x

    return function


HOSTILE = {
    "format": lambda t, m: m.update(format="other"),
    "no metadata": lambda t, m: m.clear(),
    "no options": lambda t, m: m.pop("options"),
    "options are a list": lambda t, m: m.update(options="[]"),
    "options are nested": lambda t, m: m.update(options="[" * 100_000),
    "options are no JSON": lambda t, m: m.update(options="{"),
    "layers are a number": lambda t, m: m.update(layers="3"),
    "too few layers": lambda t, m: m.update(layers="[null]"),
    "a layer is a string": lambda t, m: m.update(layers='["a", "b"]'),
    "one layer is empty": lambda t, m: m.update(layers=f"[null, {json.loads(m['layers'])[1]}]"),
    "extra option": edit_options(window=3),
    "bits": edit_options(k_bits=5),
    "bits as text": edit_options(k_bits="4"),
    "other bits": edit_options(k_bits=4),
    "many rounds": edit_options(rounds=10**9),
    "rotation": edit_options(rotation=["hadamard"]),
    "negative window": edit_options(window_tokens=-1),
    "skip": edit_options(skip_layers="01"),
    "skip out of range": edit_options(skip_layers=[7]),
    "skipped though compressed": edit_options(skip_layers=[0]),
    "layer bits of a list": edit_options(layer_bits=[[0, 4, 4]]),
    "layer bits of one number": edit_options(layer_bits={"0": 4}),
    "layer bits of no layer": edit_options(layer_bits={"a": [4, 4]}),
    "layer bits out of range": edit_options(layer_bits={"7": [4, 4]}),
    "other layer bits": edit_options(layer_bits={"0": [4, 4]}),
    "layer bits of 16": edit_options(layer_bits={"0": [16, 16]}),
    "sinks": edit_options(sink_tokens=3),
    "negative tokens": edit_layer(codes=-16),
    "huge": edit_layer(codes=2**62, seen=2**62 + 20),
    "many tokens": edit_layer(codes=10**9, seen=10**9 + 20),
    "one token less": edit_layer(codes=63, seen=89),
    "longer than the other layer": edit_layer(seen=91),
    "batch": edit_layer(batch=1),
    "batch as text": edit_layer(batch="2"),
    "batch as truth": edit_layer(batch=True),
    "head_dim": edit_layer(head_dim=72),
    "dtype": edit_layer(dtype="I64"),
    "other dtype": edit_layer(dtype="F16"),
    "center": edit_layer(center=True),
    "entry": edit_layer(more=1),
    "missing tensor": lambda t, m: t.pop("0.codes.0.k.scales"),
    "extra tensor": lambda t, m: t.update(x=torch.zeros(1)),
    "transposed": edit_tensor("0.codes.0.k.0", lambda x: x.transpose(-1, -2).contiguous()),
    "short": edit_tensor("0.codes.0.v.0", lambda x: x[..., :-1, :].contiguous()),
    "type of codes": edit_tensor("0.codes.0.v.0", lambda x: x.view(torch.int8)),
    "type of scales": edit_tensor("0.codes.0.v.scales", lambda x: x.view(torch.bfloat16)),
    "infinite scale": edit_tensor("1.codes.0.k.scales", fill(float("inf"))),
    "nan": edit_tensor("1.tail.v", fill(float("nan"))),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_changed_file_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "c"
    filled().save(path)
    rewritten(path, HOSTILE[how])
    with pytest.raises(TQError):
        TurboQuantCache.load(path, LLAMA)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "c"
    filled().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(TQError, match="no whole safetensors file"):
        TurboQuantCache.load(path, LLAMA)


@pytest.mark.parametrize("header", [2**63 - 1, 2**40, 150_000_000])
def test_an_oversized_header_is_refused(tmp_path: Path, header: int) -> None:
    path = tmp_path / "c"
    filled().save(path)
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(TQError, match="no whole safetensors file"):
        TurboQuantCache.load(path, LLAMA)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 100)
    for name in ("text", "missing", "."):
        with pytest.raises(TQError, match="no whole safetensors file"):
            TurboQuantCache.load(tmp_path / name, LLAMA)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    filled().save(tmp_path / "c")
    with pytest.raises(TQError):
        TurboQuantCache.load(tmp_path / "c", GEMMA)
    three = LlamaConfig(**{**SHAPE, "num_hidden_layers": 3})
    with pytest.raises(TQError, match="3 cache layers"):
        TurboQuantCache.load(tmp_path / "c", three)


@pytest.mark.skipif(int(transformers.__version__[0]) < 5, reason="4.57 refuses such models")
@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1"])
def test_recurrent_layers_cannot_be_saved(tmp_path: Path, model_type: str) -> None:
    cache = TurboQuantCache(transformers.AutoConfig.for_model(model_type))
    with pytest.raises(TQError, match="only attention layers can be saved"):
        cache.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"):
        filled().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
