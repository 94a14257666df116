"""Keys with a large common part: the warning, and what a center restores."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tq_hf import KeyCenterWarning, TurboQuantCache
from tq_hf.argument import cache_argument
from tq_hf.models import held_out_text, load_model, perplexity
from transformers import DynamicCache


def test_a_center_restores_the_quality_of_a_model_with_large_biases() -> None:
    model, tokenizer = load_model("tiny-large-bias")
    ids = torch.tensor([tokenizer.encode(held_out_text("werkzeug"))[:1024]])
    calibration = DynamicCache()
    model(input_ids=ids, **cache_argument(model, calibration))
    centers = {i: layer.keys.mean(dim=(0, 2)) for i, layer in enumerate(calibration.layers)}

    def measured(make_cache: Any) -> float:
        texts = [held_out_text("click")]
        how = {"max_tokens": 512, "chunk": 128, "make_cache": make_cache}
        return perplexity(model, tokenizer, texts, **how).perplexity

    exact = measured(DynamicCache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KeyCenterWarning)
        centred = measured(lambda: TurboQuantCache(model.config, key_center=centers))
    with pytest.warns(KeyCenterWarning, match="pass key_center"):
        plain = measured(lambda: TurboQuantCache(model.config))
    assert abs(centred / exact - 1) < 0.02
    assert plain > 1.2 * exact


def test_no_warning_where_it_does_not_matter(trained: Any) -> None:
    model = trained[0]
    ids = torch.randint(1, 4096, (2, 200))
    constant = torch.ones(1, 2, 100, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KeyCenterWarning)
        model(input_ids=ids, **cache_argument(model, TurboQuantCache(model.config)))
        TurboQuantCache(model.config, k_bits=8).update(constant, constant, 0)
        TurboQuantCache(model.config).update(constant[:, :, :60], constant[:, :, :60], 0)
        # A row of padding tells nothing about the others.
        rows = torch.cat((constant, torch.randn_like(constant)))
        TurboQuantCache(model.config).update(rows, rows, 0)
    with pytest.warns(KeyCenterWarning):
        TurboQuantCache(model.config).update(constant, constant, 0)
