"""Measure the models of ``tq_hf.models`` and write ``results/<name>-quality.json``.

Runs on a CPU in a few minutes: held-out perplexity and bits per byte beside general-purpose
compressors, retrieval accuracy by distance, and perplexity with quantized keys.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tq_core import HadamardRotation, lloyd_max
from tq_hf import cache_argument
from tq_hf.models import (
    Perplexity,
    available_models,
    held_out_documents,
    held_out_text,
    load_model,
    perplexity,
    retrieval_accuracy,
)
from tq_hf.verify.texts import CALIBRATION
from transformers import DynamicCache

RESULTS = Path(__file__).resolve().parent / "results"


class QuantizedKeys(DynamicCache):
    """A cache that returns every key as a quantizer would restore it; values stay exact.

    Keys are rotated, scaled to unit length and rounded to the Lloyd-Max codebook; ``centers``
    [layers] of [kv_heads, 1, head_dim], where given, are subtracted before and added after.
    """

    def __init__(self, head_dim: int, bits: int, centers: list[Tensor] | None) -> None:
        super().__init__()
        book = lloyd_max(head_dim, bits)
        self.centroids = torch.tensor(book.centroids, dtype=torch.float32)
        self.boundaries = torch.tensor(book.boundaries, dtype=torch.float32)
        self.matrix = torch.tensor(HadamardRotation(head_dim).matrix, dtype=torch.float32)
        self.centers = centers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **kw: Any
    ) -> Any:
        """Quantize the new keys, then store and return as the base class does."""
        center = self.centers[layer_idx] if self.centers else torch.zeros(())
        keys = (key_states - center) @ self.matrix.T
        norm = keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        codes = torch.bucketize((keys / norm).contiguous(), self.boundaries, right=True)
        keys = (self.centroids[codes] * norm) @ self.matrix + center
        return super().update(keys, value_states, layer_idx, *rest, **kw)


class ScaledKeys(DynamicCache):
    """A cache that multiplies every key by a constant: attention at another temperature."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **kw: Any
    ) -> Any:
        """Scale the new keys, then store and return as the base class does."""
        return super().update(key_states * self.factor, value_states, layer_idx, *rest, **kw)


class RecordedKeys(DynamicCache):
    """A cache that keeps the mean key of each layer and head."""

    def __init__(self) -> None:
        super().__init__()
        self.centers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **kw: Any
    ) -> Any:
        """Record the mean over tokens, then store and return as the base class does."""
        self.centers.append(key_states.mean(dim=(0, 2)).unsqueeze(1))
        return super().update(key_states, value_states, layer_idx, *rest, **kw)


def row(result: Perplexity) -> dict[str, float]:
    """Return a perplexity as JSON numbers."""
    return {
        "perplexity": round(result.perplexity, 4),
        "bits_per_byte": round(result.bits_per_byte, 5),
        "tokens": result.tokens,
        "bytes": result.bytes,
    }


def together(each: list[Perplexity]) -> Perplexity:
    """Return the perplexity of several texts as one."""
    return Perplexity(
        sum(r.nats for r in each), sum(r.tokens for r in each), sum(r.bytes for r in each)
    )


def key_quantization(model: Any, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """Measure perplexity with 2, 3 and 4-bit keys, plain and with their mean subtracted."""
    recorder = RecordedKeys()
    ids = tokenizer.encode(held_out_text(CALIBRATION), add_special_tokens=False)[:2048]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=True, **cache_argument(model, recorder))
    dim = model.config.head_dim
    names = sorted({d.package for d in held_out_documents()} - {CALIBRATION})
    texts = [held_out_text(name) for name in names]

    def measure(make_cache: Any) -> dict[str, float]:
        each = [
            perplexity(
                model, tokenizer, [text], max_tokens=tokens // len(texts), make_cache=make_cache
            )
            for text in texts
        ]
        return row(together(each))

    result: dict[str, Any] = {"exact": measure(None), "calibration": CALIBRATION}
    for bits in (4, 3, 2):
        result[f"plain_{bits}"] = measure(lambda b=bits: QuantizedKeys(dim, b, None))
        result[f"centred_{bits}"] = measure(lambda b=bits: QuantizedKeys(dim, b, recorder.centers))
    return result


def controls(model: Any, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """Separate the noise of 3-bit keys from their shrinkage.

    A Lloyd-Max reconstruction is shorter than the key by 1 - D on average, which softens
    attention; exact keys are shrunk alike, and quantized keys are stretched back.
    """
    dim = model.config.head_dim
    factor = 1.0 - float(lloyd_max(dim, 3).mse)
    names = sorted({d.package for d in held_out_documents()} - {CALIBRATION})

    def stretched() -> QuantizedKeys:
        cache = QuantizedKeys(dim, 3, None)
        cache.centroids = cache.centroids / factor
        return cache

    result: dict[str, Any] = {"factor": round(factor, 5)}
    for key, make in {
        "exact_shrunk": lambda: ScaledKeys(factor),
        "plain_3_stretched": stretched,
    }.items():
        each = [
            perplexity(
                model,
                tokenizer,
                [held_out_text(n)],
                max_tokens=tokens // len(names),
                make_cache=make,
            )
            for n in names
        ]
        result[key] = row(together(each))
    return result


def compressors() -> dict[str, float]:
    """Return bits per byte of general-purpose compressors on the whole held-out text."""
    data = held_out_text().encode()
    return {
        "gzip -9": round(8 * len(gzip.compress(data, 9)) / len(data), 4),
        "bzip2 -9": round(8 * len(bz2.compress(data, 9)) / len(data), 4),
        "xz -9e": round(
            8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data), 4
        ),
    }


def main() -> int:
    """Evaluate the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=available_models(), action="append")
    parser.add_argument("--count", type=int, default=40, help="retrieval prompts a distance")
    parser.add_argument("--tokens", type=int, default=12_288, help="tokens for quantized keys")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--controls", action="store_true", help="only the controls of tiny")
    options = parser.parse_args()
    if options.controls:
        measured = controls(*load_model("tiny"), options.tokens)
        (options.out / "tiny-controls.json").write_text(json.dumps(measured, indent=1) + "\n")
        return 0
    for name in options.model or available_models():
        model, tokenizer = load_model(name)
        report = {
            "model": name,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "held_out": row(perplexity(model, tokenizer)),
            "compressors_bits_per_byte": compressors(),
            "key_quantization": key_quantization(model, tokenizer, options.tokens),
            "retrieval": {
                "prompts": options.count,
                "seed": 0,
                "definitions": 6,
                "accuracy": {
                    str(k): v
                    for k, v in retrieval_accuracy(model, tokenizer, count=options.count).items()
                },
            },
        }
        path = options.out / f"{name}-quality.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
