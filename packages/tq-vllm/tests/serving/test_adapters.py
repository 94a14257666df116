"""A LoRA adapter on compressed pages, and the same engine without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tq_kernels import KVFormat

LENGTHS, NEW, RANK, ALPHA = (150, 37, 64), 16, 4, 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a random adapter in PEFT's format, and of the model with it merged in."""
    import torch
    from safetensors.torch import load_file, save_file

    lora, merged = tmp_path_factory.mktemp("lora"), tmp_path_factory.mktemp("merged")
    weights, parts = load_file(tiny / "model.safetensors"), {}
    random = torch.Generator().manual_seed(3)
    for name in [n for n in weights if n.split(".")[-2] in MODULES]:
        rows, columns = weights[name].shape
        a = torch.randn(RANK, columns, generator=random) * columns**-0.5
        b = torch.randn(rows, RANK, generator=random) * 0.02
        module = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        weights[name] = weights[name].float() + ALPHA / RANK * b @ a
    save_file(parts, lora / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": MODULES,
        "bias": "none",
    }
    (lora / "adapter_config.json").write_text(json.dumps(config))
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(tiny / file, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return lora, merged


def test_an_adapter_gives_the_tokens_of_the_merged_model(start, reference, decide, tiny, adapter):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora, merged = adapter
    fmt = KVFormat(128, 4, 4)
    plain_prompts, plain = decide(reference(tiny, fmt), LENGTHS, NEW)
    prompts, adapted = decide(reference(merged, fmt), LENGTHS, NEW)
    settings = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
    with start(tiny, settings, enable_lora=True, max_lora_rank=8) as engine:
        # One after the other: vLLM's LoRA for CPUs reaches requests without adapter in a batch.
        tokens = {}
        for asked in (LoRARequest("a", 1, str(lora)), None):
            outs = engine.llm.generate(
                [{"prompt_token_ids": p} for p in (*prompts, *plain_prompts)],
                SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True),
                lora_request=asked,
                use_tqdm=False,
            )
            tokens[asked is not None] = [list(o.outputs[0].token_ids) for o in outs]
    assert tokens[True][:3] == [a.tokens for a in adapted]
    assert tokens[False][3:] == [a.tokens for a in plain]
    assert tokens[True] != tokens[False]  # the adapter changes what is generated
