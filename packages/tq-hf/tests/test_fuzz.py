"""Damaged files: each loads whole and finite or raises TQError, and fills nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.storage import restore
from tq_hf.verify.calibration import read_centers, write_centers
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@dataclass(repr=False)
class Files:
    """A path to write to, and what files hold that are right."""

    path: Path
    cache: bytes
    centers: bytes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    path = tmp_path_factory.mktemp("fuzz") / "file"
    cache = TurboQuantCache(CONFIG, k_bits=3, window_tokens=8)
    torch.manual_seed(0)
    for layer in range(2):
        x = torch.randn(1, 2, 40, 16, dtype=torch.bfloat16)
        cache.update(x, x.flip(-1), layer)
    cache.save(path)
    stored = path.read_bytes()
    write_centers({layer: torch.randn(2, 16) for layer in range(2)}, path, "test")
    return Files(path, stored, path.read_bytes())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def cut(data: bytes, draw: Any) -> bytes:
    return data[: draw(st.integers(0, len(data) - 1))]


def flip(data: bytes, draw: Any) -> bytes:
    end = draw(st.sampled_from([8, int.from_bytes(data[:8], "little") + 8, len(data)]))
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        out[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
    return bytes(out)


def insert(data: bytes, draw: Any) -> bytes:
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]


def describe(data: bytes, draw: Any) -> bytes:
    """Another value in the header, which stays JSON; in the description too where there is one."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[draw(st.sampled_from(sorted(header)))]
    name = draw(st.sampled_from(sorted(entry)))
    if name in ("options", "layers"):
        inner = json.loads(entry[name])
        part = inner if name == "options" else inner[draw(st.integers(0, 1))]
        part[draw(st.sampled_from(sorted(part)))] = draw(JSON)
        entry[name] = json.dumps(inner)
    else:
        entry[name] = draw(JSON)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


DAMAGE = st.sampled_from([cut, flip, insert, describe])


@settings(max_examples=400, deadline=None)
@given(how=DAMAGE, data=st.data())
def test_a_damaged_cache(files: Files, how: Any, data: st.DataObject) -> None:
    files.path.write_bytes(how(files.cache, data.draw))
    layers = TurboQuantCache(CONFIG, k_bits=3, window_tokens=8).layers
    try:
        restore(layers, files.path, torch.device("cpu"))
    except TQError:
        assert not any(layer.is_initialized for layer in layers)
    try:
        cache = TurboQuantCache.load(files.path, CONFIG)
    except TQError:
        return
    for layer in cache.layers:
        if layer.is_initialized:
            assert layer.keys.shape[:2] == (1, 2) and layer.keys.shape[3] == 16
            assert bool(torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all())


@settings(max_examples=200, deadline=None)
@given(how=DAMAGE, data=st.data())
def test_damaged_key_centers(files: Files, how: Any, data: st.DataObject) -> None:
    files.path.write_bytes(how(files.centers, data.draw))
    try:
        centers = read_centers(files.path)
    except TQError:
        return
    for layer, center in centers.items():
        assert layer >= 0 and center.dim() == 2 and center.dtype == torch.float32
        assert bool(torch.isfinite(center).all())
