"""The demo's measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tq_core import PageLayout
from tq_hf import demo_measure, models
from transformers import DynamicCache

pytest.importorskip("typer")
import typer
from tq_hf.demo import demo
from typer.testing import CliRunner


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(demo)
    return CliRunner().invoke(app, list(arguments))


def test_demo_writes_its_numbers_and_a_chart(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n")
    options = ["--tokens", "6", "--held-out-tokens", "192", "--out", str(tmp_path), "--json"]
    result = invoke(str(source), *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in report["caches"]}
    assert list(rows) == ["16-bit", "K4V4", "K4V3", "K3V3"]
    base = rows["16-bit"]
    assert base["agreement"] == base["ratio"] == 1.0
    assert base["same_prefix"] == base["generated"] == 6
    assert base["projection_bytes"] == 2**34
    assert rows["K4V4"]["projection_bytes"] == 131072 * 32 * 8 * 132
    for row in rows.values():
        assert row["perplexity"] < 2 * base["perplexity"]
        assert row["predicted"] == 192
    for name in ("K4V4", "K4V3", "K3V3"):
        assert 0.5 < rows[name]["agreement"] <= 1.0
        assert rows[name]["perplexity"] != base["perplexity"]


def test_the_text_is_shown_for_every_cache(tmp_path: Path) -> None:
    options = ["--tokens", "2", "--held-out-tokens", "8", "--out", str(tmp_path)]
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    for name in demo_measure.FORMATS:
        assert name in result.stdout


def test_too_many_tokens_are_refused() -> None:
    result = invoke("--tokens", "5000")
    assert result.exit_code == 1
    assert "5768" in result.output
    assert "2048" in result.output


def test_prediction_in_chunks_is_the_perplexity_of_the_model() -> None:
    model, tokenizer = models.load_model("tiny")
    text = models.held_out_text("click")
    ids = torch.tensor([[0, *tokenizer.encode(text)[:200]]])
    parts = demo_measure.predict(model, ids, DynamicCache(), 33)
    nats = torch.cat([n for n, _ in parts])
    whole = models.perplexity(model, tokenizer, [text], max_tokens=200)
    assert len(nats) == 200
    assert math.exp(float(nats.mean())) == pytest.approx(whole.perplexity, rel=1e-4)


@pytest.mark.parametrize("bits", [(4, 4), (4, 3), (3, 3)])
def test_bytes_a_token_follow_the_format(bits: tuple[int, int]) -> None:
    shape = demo_measure.ModelShape(layers=6, kv_heads=2, head_dim=128)
    assert demo_measure.bytes_per_token(shape, *bits) == 12 * (128 * sum(bits) // 8 + 4)
    assert PageLayout(128, *bits).slot_bytes * 12 == demo_measure.bytes_per_token(shape, *bits)


def test_held_bytes_counts_each_storage_once() -> None:
    x = torch.zeros(10, dtype=torch.float32)
    y = torch.zeros(3, dtype=torch.uint8)
    assert demo_measure.held_bytes({"a": [x, x[2:4]], "b": (y, "text")}) == 43
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    assert demo_measure.held_bytes(cache) == 2 * 2 * 5 * 8 * 4
