"""Recall of values from a long prompt, on the trained models.

Usage: ``python benchmarks/quality_recall.py [--model tiny] [--prompts 20]``

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
from torch import Tensor
from tq_hf.models import held_out_text, load_model
from tq_hf.models.quality import is_reserved
from tq_hf.verify.calibration import key_centers
from tq_hf.verify.roundings import integers, kivi, turboquant, vllm_turboquant
from tq_hf.verify.simulate import RoundedHistory
from tq_hf.verify.texts import CALIBRATION, start_token, token_windows
from tq_kernels import KVFormat

DEFINITIONS, QUESTIONS, TOKENS = 64, 32, 1500
DEPTHS = ("first third", "second third", "last third")


def recall_prompt(tokenizer: Any, seed: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """A prompt with its questions.

    Returns
    -------
    ids : int64 tensor [1, tokens]
    answers : list of tuples of int
        Start and end of each value, and the third of the prompt that its definition lies in.
    """

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    rng = np.random.default_rng([seed, 64])
    names: list[str] = []
    while len(names) < DEFINITIONS:
        name = "".join(chr(65 + i) for i in rng.integers(0, 26, 4))
        if is_reserved(name) and name not in names:
            names.append(name)
    values = [str(n) for n in rng.integers(1000, 10000, DEFINITIONS)]
    newline = encode("\n")
    lines = [newline + encode(f"NAME_{n} = {v}\n") for n, v in zip(names, values, strict=True)]
    room = TOKENS - sum(map(len, lines))
    text = encode(held_out_text())
    first = int(rng.integers(0, len(text) - room))
    text = text[first : first + room]
    ids, last, thirds = start_token(tokenizer), 0, []
    for cut, line in zip(sorted(rng.integers(0, room + 1, DEFINITIONS)), lines, strict=True):
        ids += text[last:cut]
        thirds.append(3 * len(ids) // TOKENS)
        ids += line
        last = cut
    ids += text[last:]
    answers = []
    for i in rng.permutation(DEFINITIONS)[:QUESTIONS]:
        question = newline + encode(f"assert NAME_{names[i]} == ")
        whole = newline + encode(f"assert NAME_{names[i]} == {values[i]}\n")
        if whole[: len(question)] != question:  # the blank is part of the value's first token
            question = question[:-1]
        start, stop = len(ids) + len(question), len(ids) + len(whole) - len(newline)
        answers.append((start, stop, min(2, thirds[i])))
        ids = ids + whole
    return torch.tensor([ids]), answers


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
    model: Any, prompts: list[tuple[Tensor, list[tuple[int, int, int]]]], history: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value was recalled, and the mean of -log p of its tokens, [prompts, values]."""
    hits, nats = [], []
    for ids, answers in prompts:
        guess = logits(model, ids[:, :-1], history)[0].float()
        for start, stop, _ in answers:
            value, at = ids[0, start:stop], guess[start - 1 : stop - 1]
            hits.append(bool(torch.equal(at.argmax(-1), value)))
            nats.append(float(torch.nn.functional.cross_entropy(at, value)))
    shape = (len(prompts), -1)
    return np.array(hits, float).reshape(shape), np.array(nats).reshape(shape)


def measure(model: Any, tokenizer: Any, name: str, count: int) -> Iterator[dict[str, Any]]:
    """Recall with every format, and what it lost, with a 95% interval over prompts."""
    prompts = [recall_prompt(tokenizer, seed) for seed in range(count)]
    thirds = np.array([[third for _, _, third in answers] for _, answers in prompts])
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
    parser.add_argument("--prompts", type=int, default=20)
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
