"""Recall of values from a long prompt, on the trained models.

Usage: ``python benchmarks/quality_recall.py [--model tiny] [--prompts 60]``

Writes ``results/quality-retrieval-MODEL.json``. A prompt is held-out code with 64 lines such as
``NAME_ABCD = 1234`` in it, then a question such as ``assert NAME_ABCD == 1234`` for 32 of them, one
after the other. A value is recalled if all its tokens are the most probable ones. Every token after
the sinks and before the window is read as stored (see ``benchmarks/quality.py``, whose results of
the model this script takes the bits by layer from).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quality import RESULTS, WINDOW, logits, significant
from rich.progress import track
from scipy.stats import bootstrap
from tq_hf.models import held_out_text, load_model
from tq_hf.verify.calibration import key_centers
from tq_hf.verify.recall import RecallPrompt, recall_prompt
from tq_hf.verify.roundings import integers, kivi, turboquant, vllm_turboquant
from tq_hf.verify.simulate import RoundedHistory
from tq_hf.verify.texts import CALIBRATION, token_windows
from tq_kernels import KVFormat

DEFINITIONS, QUESTIONS, TOKENS = 64, 32, 1500
DEPTHS = ("first third", "second third", "last third")


def formats(model: Any, tokenizer: Any, name: str) -> dict[str, RoundedHistory | None]:
    """What is compared; None is a 16-bit cache."""
    dim, centers = model.config.head_dim, None
    if model.config.model_type == "qwen2":
        windows = token_windows(tokenizer, [held_out_text(CALIBRATION)], WINDOW, 4)
        centers = key_centers(model, windows)
    found: dict[str, RoundedHistory | None] = {"16-bit": None}
    for k, v in ((4, 4), (3, 3), (3, 2), (2, 2)):
        found[f"K{k}V{v}"] = turboquant(KVFormat(dim, k, v), centers=centers)
    measured = json.loads((RESULTS / f"quality-{name}.json").read_text(encoding="utf-8"))
    for row in measured["configurations"]:
        if row["name"] in ("bits by layer, 100 bytes", "bits by layer, 84 bytes"):
            bits = [(k, v) for k, v in row["layer_bits"]]
            history = turboquant(KVFormat(dim), centers=centers, layer_bits=bits)
            found[row["name"]] = history
    found["INT4 + Hadamard"] = integers(dim, 4)
    found["KIVI 2"] = kivi(dim, 2)
    found["vLLM turboquant_3bit_nc"] = vllm_turboquant(dim, "3bit_nc")
    return found


def recalled(
    model: Any, prompts: list[RecallPrompt], history: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value was recalled, and the mean of -log p of its tokens, [prompts, values]."""
    hits, nats = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        guess = logits(model, ids[:, :-1], history)[0].float()
        for answer in prompt.answers:
            value = ids[0, answer.start : answer.stop]
            at = guess[answer.start - 1 : answer.stop - 1]
            hits.append(bool(torch.equal(at.argmax(-1), value)))
            nats.append(float(torch.nn.functional.cross_entropy(at, value)))
    shape = (len(prompts), -1)
    return np.array(hits, float).reshape(shape), np.array(nats).reshape(shape)


def measure(model: Any, tokenizer: Any, name: str, count: int) -> Iterator[dict[str, Any]]:
    """Recall with every format, and what it lost, with a 95% interval over prompts."""
    sizes = {"definitions": DEFINITIONS, "questions": QUESTIONS}
    prompts = [recall_prompt(tokenizer, TOKENS, **sizes, seed=seed) for seed in range(count)]
    places = np.array([[answer.place for answer in prompt.answers] for prompt in prompts])
    thirds = np.minimum(2, 3 * places // TOKENS)
    base: np.ndarray | None = None
    for label, history in track(formats(model, tokenizer, name).items(), name):
        hits, nats = recalled(model, prompts, history)
        base = hits if base is None else base
        lost = (base - hits).mean(axis=1)
        interval = [0.0, 0.0]
        if np.ptp(lost) > 0:
            found = bootstrap((lost,), np.mean, method="percentile", rng=np.random.default_rng(0))
            interval = [float(x) for x in found.confidence_interval]
        yield {
            "name": label,
            "slot_bytes": 4 * model.config.head_dim if history is None else history.slot_bytes,
            "accuracy": float(hits.mean()),
            "lost": float(lost.mean()),
            "lost_interval": interval,
            "answer_nats": float(nats.mean()),
            "cells": [
                {"depth": depth, "accuracy": float(hits[thirds == i].mean())}
                for i, depth in enumerate(DEPTHS)
            ],
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(given.model)
    report: dict[str, Any] = {
        "model": given.model,
        "command": f"python benchmarks/quality_recall.py --model {given.model}",
        "definitions": DEFINITIONS,
        "questions": QUESTIONS * given.prompts,
        "prompts": given.prompts,
        "tokens": TOKENS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "configurations": [],
    }
    out = given.out or RESULTS / f"quality-retrieval-{given.model}.json"
    for row in measure(model, tokenizer, given.model, given.prompts):
        report["configurations"].append(significant(row))
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
