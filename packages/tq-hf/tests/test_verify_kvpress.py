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


def test_a_missing_kvpress_is_named(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress.pipeline", None)
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(TQError, match="pip install kvpress"):
        kvpress_pipeline(*single)
