"""The shipped models: they load, they are good, and the training tool agrees with them."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_hf import models
from tq_hf.models import quality
from transformers import DynamicCache

TOOL = Path(__file__).resolve().parents[3] / "tools" / "train_tiny_lm"
sys.path.insert(0, str(TOOL))

NAMES = models.available_models()


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return (request.param, *models.load_model(request.param))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'huge'.*tiny-large-bias"):
        models.load_model("huge")
    with pytest.raises(ValueError, match="'numpy' is not held out"):
        models.held_out_text("numpy")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bfloat16_and_small(name: str) -> None:
    from safetensors import safe_open

    path = models.model_path(name) / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_shape(loaded: tuple[str, Any, Any]) -> None:
    name, model, tokenizer = loaded
    assert model.config.head_dim == 128
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1
    assert model.config.max_position_embeddings >= 2048
    assert model.dtype == torch.float32 and not model.training
    assert 6e6 < sum(p.numel() for p in model.parameters()) < 8e6
    biases = [p for n, p in model.named_parameters() if n.endswith("k_proj.bias")]
    assert len(biases) == (model.config.num_hidden_layers if name == "tiny-large-bias" else 0)
    assert all(b.abs().max() > 30 for b in biases)
    assert tokenizer.eos_token_id == 0


def test_dtype_is_an_option() -> None:
    assert models.load_model("tiny", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_tokenizer_is_lossless() -> None:
    tokenizer = models.load_model("tiny")[1]

    @settings(max_examples=100, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if "<|endoftext|>" not in text:
            assert tokenizer.decode(ids) == text
            assert quality._byte_length(tokenizer, ids) == len(text.encode())

    check()


def test_perplexity_beats_compressors(loaded: tuple[str, Any, Any]) -> None:
    import lzma

    _, model, tokenizer = loaded
    text = models.held_out_text("werkzeug")
    result = models.perplexity(model, tokenizer, [text], max_tokens=4096)
    assert result.tokens == 4096
    compressed = 8 * len(lzma.compress(models.held_out_text().encode(), preset=9))
    assert result.bits_per_byte < 0.7 * compressed / len(models.held_out_text().encode())


def test_perplexity_notices_damage() -> None:
    model, tokenizer = models.load_model("tiny")
    text = [models.held_out_text("rich")]
    good = models.perplexity(model, tokenizer, text, max_tokens=512)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight.mul_(0)
    bad = models.perplexity(model, tokenizer, text, max_tokens=512)
    assert bad.perplexity > 1.05 * good.perplexity


def test_perplexity_with_chunked_cache_is_the_same(loaded: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = loaded
    text = [models.held_out_text("click")]
    plain = models.perplexity(model, tokenizer, text, max_tokens=300)
    cached = models.perplexity(
        model, tokenizer, text, max_tokens=300, make_cache=DynamicCache, chunk=70
    )
    assert cached.nats == pytest.approx(plain.nats, rel=1e-4)
    with pytest.raises(ValueError, match="0 tokens"):
        models.perplexity(model, tokenizer, [""])


@pytest.mark.parametrize("distance", [64, 500, 1536])
def test_retrieval_tasks_are_as_described(distance: int) -> None:
    tokenizer = models.load_model("tiny")[1]
    tasks = models.retrieval_tasks(tokenizer, distance, 5, seed=3)
    assert tasks == models.retrieval_tasks(tokenizer, distance, 5, seed=3)
    assert tasks != models.retrieval_tasks(tokenizer, distance, 5, seed=4)
    assert all(distance + 160 < len(task.prompt) <= 2048 for task in tasks)
    for task in tasks:
        text, value = tokenizer.decode(task.prompt), tokenizer.decode(task.answer)
        name = text.rsplit("assert ", 1)[1].split(" ==")[0]
        assert text.count(f"{name} = {value}\n") == 1 and text.count(value) >= 1
        assert text.count("NAME_") == 7
        assert quality.is_reserved(name.removeprefix("NAME_"))
        tail = tokenizer.decode(task.prompt[-distance:])
        assert f"{name} = {value}" not in tail
        assert f"{name} = {value}\n" in tokenizer.decode(task.prompt[-distance - 16 :])
    with pytest.raises(ValueError, match="distance=2048"):
        models.retrieval_tasks(tokenizer, 2048, 1)


def test_retrieval_is_far_above_chance(loaded: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = loaded
    accuracy = models.retrieval_accuracy(model, tokenizer, (64, 1536), count=10)
    assert min(accuracy.values()) >= 0.8


def test_retrieval_fails_without_context() -> None:
    model, tokenizer = models.load_model("tiny")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0)
    assert models.retrieval_accuracy(model, tokenizer, (64,), count=10)[64] <= 0.2


def test_held_out_text_is_attributed_and_small() -> None:
    path = Path(models.__file__).with_name("held_out.json")
    assert path.stat().st_size <= 300_000
    data = json.loads(path.read_text(encoding="utf-8"))
    corpus = json.loads((TOOL / "results" / "corpus.json").read_text(encoding="utf-8"))
    trained = {row["package"] for row in corpus["packages"] if row["split"] == "train"}
    for document in models.held_out_documents():
        assert document.package not in trained
        assert len(data["packages"][document.package]["licence_text"]) > 200


def test_cards_match_the_results() -> None:
    assert (
        subprocess.run([sys.executable, TOOL / "card.py", "--check"], check=False).returncode == 0
    )


@given(st.text(alphabet=string.ascii_uppercase, min_size=4, max_size=4))
def test_training_and_evaluation_names_are_disjoint(name: str) -> None:
    exercises = pytest.importorskip("exercises")
    assert exercises.is_reserved(name) == quality.is_reserved(name)


def test_training_never_uses_reserved_names() -> None:
    import numpy as np

    exercises = pytest.importorskip("exercises")
    rng = np.random.default_rng(0)
    first = [exercises.definition(rng)[0] for _ in range(300)]
    names = [line[5:9] for line in first if line.startswith("NAME_")]
    assert len(names) > 30 and not any(map(quality.is_reserved, names))


@pytest.mark.parametrize("name", NAMES)
def test_network_of_the_tool_is_the_model(name: str) -> None:
    from network import CausalLM
    from train import SHAPES

    model, _ = models.load_model(name)
    own = CausalLM(SHAPES[name])
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    own.load_state_dict(state)
    tokens = torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(own.logits(tokens), expected, rtol=2e-4, atol=2e-3)


def test_muon_orthogonalises() -> None:
    from muon import orthogonalise

    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 32, 64), (1, 64, 32), (3, 32, 32)]:
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.max() < 1.35
        assert values.mean() > 0.6


@torch.enable_grad()
def test_tool_trains_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of a small network on a small corpus write files that transformers loads."""
    import train
    from network import Shape
    from transformers import AutoModelForCausalLM

    small = Shape(
        hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, head_dim=16, context=64
    )
    monkeypatch.setitem(train.SHAPES, "tiny", small)
    monkeypatch.setitem(train.SHAPES, "tiny-large-bias", small)
    arguments = ["--out", str(tmp_path), "--model", "tiny", "--steps", "10", "--batch", "4"]
    arguments += ["--exercises", "8", "--package-limit", "60000", "--total-limit", "1500000"]
    assert train.main([*arguments, "--log-every", "5", "--warmup", "2"]) == 0
    report = json.loads((tmp_path / "tiny" / "training.json").read_text())
    assert report["steps"] == 10
    assert report["curve"][-1]["train_loss"] < report["curve"][0]["train_loss"]
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(report["config"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 4096)
    rows = json.loads((tmp_path / "corpus.json").read_text())["packages"]
    assert all(row["licence"] for row in rows if row["files"])
