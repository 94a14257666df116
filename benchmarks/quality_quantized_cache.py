"""transformers' own quantized caches (quanto and HQQ) beside ours, run as caches.

Usage: ``python benchmarks/quality_quantized_cache.py [--windows 1] [--threads 1]``, with
``pip install optimum-quanto hqq``. Writes ``results/quality-quantized-caches.json``.

Predictions of 1,024 tokens of held-out text, fed in pieces of 32, against a 16-bit cache. The
quantized caches keep the last tokens at 16 bits and round all others anew, with those that joined
them, every time ``residual_length`` is exceeded. Groups of 64 numbers, along the axis that
transformers takes by default for the backend, have a scale and a zero point, counted as 16 bits
each. Ours has its defaults, and centred keys on the model with key biases.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tq_hf import TurboQuantCache
from tq_hf.models import held_out_text, load_model
from tq_hf.verify.calibration import key_centers
from tq_hf.verify.predictions import baseline_factory, compare_predictions
from tq_hf.verify.scores import summarize
from tq_hf.verify.texts import CALIBRATION, builtin_texts, token_windows
from transformers import QuantizedCache

OUT = Path(__file__).resolve().parent / "results" / "quality-quantized-caches.json"
WINDOW, GROUP, RESIDUAL = 1024, 64, 32
MODELS = ("tiny", "tiny-large-bias")


def factories(model: Any, tokenizer: Any) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Name -> bytes of a token and head, and a function that makes an empty cache."""
    config, dim = model.config, model.config.head_dim
    centers = None
    if config.model_type == "qwen2":
        text = token_windows(tokenizer, [held_out_text(CALIBRATION)], WINDOW, 4)
        centers = key_centers(model, text)
    found: dict[str, tuple[float, Callable[[], Any]]] = {}
    for bits in (4, 2):
        size = 2 * (dim * bits / 8 + 4 * dim / GROUP)
        for backend, axis in (("quanto", 0), ("hqq", 1)):

            def make(backend: str = backend, axis: int = axis, bits: int = bits) -> Any:
                return QuantizedCache(
                    backend,
                    config,
                    nbits=bits,
                    axis_key=axis,
                    axis_value=axis,
                    q_group_size=GROUP,
                    residual_length=RESIDUAL,
                )

            found[f"{backend} {bits}"] = size, make
    for k, v in ((4, 4), (3, 3), (2, 2)):

        def ours(k: int = k, v: int = v) -> Any:
            return TurboQuantCache(config, k, v, key_center=centers)

        found[f"K{k}V{v}"] = 2 * 2 + dim * (k + v) / 8, ours
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report: dict[str, Any] = {
        "command": f"python benchmarks/quality_quantized_cache.py --windows {given.windows}",
        "group": GROUP,
        "residual_length": RESIDUAL,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{p: version(p) for p in ("optimum-quanto", "hqq")},
        },
        "rows": [],
    }
    for name in MODELS:
        model, tokenizer = load_model(name)
        windows = token_windows(tokenizer, builtin_texts(), WINDOW, given.windows)
        base = baseline_factory(model.config, "fp16")
        for cache, (size, make) in factories(model, tokenizer).items():
            parts = [s for s, _ in compare_predictions(model, windows, base, make)]
            row = {"model": name, "name": cache, "slot_bytes": size, **asdict(summarize(parts))}
            report["rows"].append(row)
            OUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
