"""Configurations from outside: each gives a shape that can be planned for, or raises TQError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_vllm.capacity import ModelShape, capacity, formats, read_config

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
LLAMA = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 32,
    "max_position_embeddings": 1024,
    "layer_types": ["full_attention", "sliding_attention"],
}
NAMES = st.sampled_from([*LLAMA, "text_config", "use_sliding_window", "kv_lora_rank"])


@settings(max_examples=400, deadline=None)
@example({"hidden_size": 1}, {"head_dim"})
@given(st.dictionaries(NAMES, JSON | st.integers(0, 64), max_size=3), st.sets(NAMES, max_size=1))
def test_any_configuration(changes: dict[str, object], left_out: set[str]) -> None:
    config = {n: v for n, v in (LLAMA | changes).items() if n not in left_out}
    try:
        shape = ModelShape.from_config(config)
        planned = [capacity(shape, fmt, 2**30, 100) for fmt in formats(skip_layers="0")]
    except TQError:
        return
    assert min(shape.kv_heads, shape.head_dim, shape.longest, len(shape.layers)) > 0
    assert all(0 <= one.longest <= shape.longest and one.ratio > 0 for one in planned)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\x00", '{"a": 1} x'])
def test_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TQError, match="no configuration of a model"):
        read_config(str(path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(json.dumps(LLAMA).encode("utf-16"))
    with pytest.raises(TQError, match="no configuration of a model"):
        read_config(str(path))
