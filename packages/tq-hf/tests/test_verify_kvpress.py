"""kvpress's pipeline with our cache."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.models import held_out_text
from tq_hf.verify.kvpress import kvpress_pipeline
from transformers import DynamicCache


def test_answers_are_cut_off_again(single: Any) -> None:
    pytest.importorskip("kvpress", reason="needs kvpress and a transformers that it takes")
    model, tokenizer = single
    model.set_attn_implementation("sdpa")
    pipeline = kvpress_pipeline(model, tokenizer)
    text = held_out_text("humanize")[:900]
    asked = {"questions": ["def test", "class A"], "max_new_tokens": 6}
    plain = pipeline(text, cache=DynamicCache(config=model.config), **asked)
    cache = TurboQuantCache(model.config, 8, 8)
    found = pipeline(text, cache=cache, **asked)
    assert found == plain
    length = len(tokenizer.encode(text, add_special_tokens=False))
    assert length <= cache.get_seq_length() <= length + 1  # and a start token
    assert cache.layers[0].history.tokens > 0


@pytest.mark.parametrize("name", ["KnormPress", "SnapKVPress", "StreamingLLMPress"])
def test_a_press_removes_tokens_before_they_are_encoded(single: Any, name: str) -> None:
    kvpress = pytest.importorskip("kvpress", reason="needs kvpress and a transformers it takes")
    model, tokenizer = single
    model.set_attn_implementation("sdpa")
    pipeline = kvpress_pipeline(model, tokenizer)
    text = held_out_text("humanize")[:900]
    asked = {"questions": ["def test", "class A"], "max_new_tokens": 6}
    press = getattr(kvpress, name)(compression_ratio=0.4)
    plain = DynamicCache(config=model.config)
    expected = pipeline(text, cache=plain, press=press, **asked)
    caches = [TurboQuantCache(model.config, bits, bits, window_tokens=0) for bits in (8, 2)]
    found, hurt = (pipeline(text, cache=cache, press=press, **asked) for cache in caches)
    assert found == expected
    assert len(hurt["answers"]) == 2
    for cache in caches:
        assert cache.get_seq_length() == plain.get_seq_length()
        assert cache.get_seq_length() < 0.7 * len(tokenizer.encode(text))
        assert cache.layers[0].history.tokens > 0
    for ours, theirs in zip(caches[0].layers, plain.layers, strict=True):
        assert (ours.keys - theirs.keys).abs().max() < 0.2


def test_a_press_for_generation_is_refused(single: Any) -> None:
    kvpress = pytest.importorskip("kvpress", reason="needs kvpress and a transformers it takes")
    model, tokenizer = single
    press = kvpress.DecodingPress(base_press=kvpress.KnormPress(), compression_interval=4)
    cache = TurboQuantCache(model.config)
    with pytest.raises(TQError, match="DecodingPress removes tokens while"):
        kvpress_pipeline(model, tokenizer)("def f():", cache=cache, press=press)
    assert cache.get_seq_length() == 0


def test_a_missing_kvpress_is_named(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress.pipeline", None)
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(TQError, match="pip install kvpress"):
        kvpress_pipeline(*single)
