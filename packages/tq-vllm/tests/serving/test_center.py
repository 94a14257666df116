"""Key centers and what they do to a model with large key biases."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tq_core import TQError
from tq_vllm.center import rank_heads

K4V4 = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
TEXT = 300


@pytest.fixture(scope="module")
def large_bias():
    from tq_hf.models import model_path

    return model_path("tiny-large-bias")


@pytest.fixture(scope="module")
def biased(large_bias, tmp_path_factory):
    """The model for vLLM, whose Qwen2 ignores head_dim: as a Llama with biases."""
    folder = tmp_path_factory.mktemp("biased")
    for file in ("model.safetensors", "tokenizer.json"):
        shutil.copy(large_bias / file, folder)
    config = json.loads((large_bias / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "qkv_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(held_out):
    return held_out([TEXT, TEXT])


def loss(engine, prompt) -> float:
    """Mean negative log-likelihood of a prompt."""
    (out,) = engine.generate([prompt], 1, prompt_logprobs=0)
    steps = zip(out.prompt_logprobs[1:], prompt[1:], strict=True)
    return -sum(step[token].logprob for step, token in steps) / (len(prompt) - 1)


@pytest.fixture(scope="module")
def center(large_bias, text, tmp_path_factory):
    """Mean keys on another text, written as tq calibrate does."""
    from tq_hf.verify.calibration import write_centers
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(large_bias, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([text[1]]), past_key_values=cache)
    path = tmp_path_factory.mktemp("center") / "center.safetensors"
    write_centers({n: x.keys[0].mean(dim=1) for n, x in enumerate(cache.layers)}, path, "test")
    return path


def test_a_center_recovers_what_rounding_large_biases_loses(start, biased, text, center):
    with start(biased, {"TQ_CPU": "0"}, block_size=32) as engine:
        exact = loss(engine, text[0])
    with start(biased, K4V4) as engine:
        without = loss(engine, text[0])
    with start(biased, K4V4 | {"TQ_KEY_CENTER": str(center)}) as engine:
        centered = loss(engine, text[0])
    assert without - exact > 0.3
    assert abs(centered - exact) < 0.1 * (without - exact)


def test_wrong_files_are_refused(start, biased, tmp_path):
    path = tmp_path / "center.safetensors"
    for tensors, message in (
        ({"key_center.0": torch.zeros(2, 64)}, "shape \\(2, 64\\).*2 KV heads of 128"),
        ({"key_center.0": torch.zeros(4, 128)}, "shape \\(4, 128\\)"),
        ({"key_center.1": torch.zeros(2, 128)}, "no tensor 'key_center.0'"),
        ({"key_center.0": torch.tensor(0.0)}, "shape \\(\\)"),
        ({"key_center.0": torch.full((2, 128), torch.nan)}, "not finite"),
    ):
        save_file(tensors, path)
        settings = K4V4 | {"TQ_KEY_CENTER": str(path)}
        with pytest.raises(TQError, match=message), start(biased, settings):
            pass


def test_ranks_take_their_heads() -> None:
    center = torch.arange(8.0)[:, None]
    assert rank_heads(center, 4, 1, 2)[:, 0].tolist() == [4, 5, 6, 7]
    assert rank_heads(center[:2], 1, 3, 4)[:, 0].tolist() == [1]
    assert rank_heads(center[:2], 1, 1, 4)[:, 0].tolist() == [0]
