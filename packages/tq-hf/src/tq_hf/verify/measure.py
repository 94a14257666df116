"""The whole measurement of ``tq verify``."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tq_core import TQError
from transformers.cache_utils import DynamicSlidingWindowLayer

from tq_hf.cache import TurboQuantCache
from tq_hf.demo_measure import generate
from tq_hf.layer import CompressedLayer
from tq_hf.model_layers import text_config
from tq_hf.verify.harness import harness_scores
from tq_hf.verify.layers import measure_layers
from tq_hf.verify.predictions import baseline_factory, compare_predictions
from tq_hf.verify.report import Report
from tq_hf.verify.scores import summarize
from tq_hf.verify.sweep import propose_bits, sweep_layers
from tq_hf.verify.tasks import copy_cells, retrieval_cells, task_sizes

__all__ = ["history_bytes", "measure"]

#: Called with what is measured and the share of it that is done.
Progress = Callable[[str, float], None]


def history_bytes(layers: Iterable[Any]) -> tuple[float, float]:
    """Bytes of one more token of history in filled layers of a cache, and in 16-bit ones.

    Layers with a sliding window or a recurrent state do not grow and are not counted.
    """
    coded = plain = 0.0
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            batch, heads, _, dim = layer.snapshot().shape
            if layer.history.tokens:
                used = sum(k.nbytes + v.nbytes for k, v in layer.history.parts())
                coded += used / (batch * layer.history.tokens)
            else:
                coded += 4 * heads * dim
            plain += 4 * heads * dim
        elif not isinstance(layer, DynamicSlidingWindowLayer) and isinstance(
            getattr(layer, "keys", None), Tensor
        ):
            size = 4 * layer.keys.shape[1] * layer.keys.shape[-1]
            coded, plain = coded + size, plain + size
    return coded, plain


def _divergence(
    model: Any, prompts: list[Tensor], make_base: Any, make_cache: Any, tokens: int
) -> list[int]:
    found = []
    for prompt in prompts:
        one, two = (generate(model, prompt, make(), tokens) for make in (make_base, make_cache))
        same = (a == b for a, b in zip(one, two, strict=True))
        found.append(next((i for i, equal in enumerate(same) if not equal), tokens))
    return found


def measure(
    model: Any,
    tokenizer: Any,
    windows: list[Tensor],
    options: dict[str, Any],
    *,
    name: str,
    dataset: str = "builtin",
    baseline: str = "fp16",
    limits: dict[str, float] | None = None,
    chunk: int = 32,
    prompts: int = 3,
    new_tokens: int = 48,
    tasks: bool = True,
    harness: Sequence[str] = (),
    harness_folder: Path | None = None,
    harness_limit: int | None = None,
    sweep: bool = False,
    budget: float | None = None,
    seed: int = 0,
    progress: Progress = lambda _, __: None,
) -> Report:
    """Measure a `TurboQuantCache` on a model.

    Parameters
    ----------
    model, tokenizer
        A causal language model.
    windows : list of int64 tensors [1, tokens + 1]
        Text to predict; also where generation starts from.
    options : dict
        Of `TurboQuantCache`.
    name, dataset : str
        For the report.
    baseline : {"fp16", "bf16", "model"}
        What the cache is compared with.
    limits : dict, optional
        Thresholds; see `parse_thresholds`.
    chunk : int
        Tokens fed at a time.
    prompts : int
        Retrieval prompts a length and depth, and prompts to generate from.
    new_tokens : int
        Tokens to generate; 0 leaves generation out.
    tasks : bool
        Whether to run retrieval and copying.
    harness : sequence of str
        Tasks of lm-evaluation-harness to run as well; see `harness_scores`.
    harness_folder : path, optional
        Folder of YAML files that define more of them.
    harness_limit : int, optional
        Examples of each of them.
    sweep : bool
        Whether to measure the sensitivity of each layer.
    budget : float, optional
        Bytes a token in all layers, for which the sweep proposes bits of each layer.
    seed : int
        Seed of the tasks.
    progress : callable
        Called with what is measured and the share of it that is done.

    Returns
    -------
    Report
    """
    start = time.perf_counter()
    config = model.config

    def make_cache(**changes: Any) -> TurboQuantCache:
        return TurboQuantCache(config, **{**options, **changes})

    make_base = baseline_factory(config, baseline)
    make_cache()  # refuses what cannot work before anything runs
    progress("layers", 0.0)
    layers = measure_layers(
        model,
        [ids[:, :-1] for ids in windows[:2]],
        lambda: make_cache(sink_tokens=0, window_tokens=0),
    )
    parts = []
    total = sum(ids.shape[1] - 1 for ids in windows)
    cache: Any = None
    for scores, filled in compare_predictions(model, windows, make_base, make_cache, chunk=chunk):
        parts.append(scores)
        cache = filled
        progress("predictions", sum(len(p.kl) for p in parts) / total)
    if cache is None:
        raise TQError("the windows of text are too short to score; give a longer text")
    coded, plain = history_bytes(cache.layers)
    cells = []
    if tasks:
        lengths, runs = task_sizes(int(text_config(config).max_position_embeddings))
        steps = 3 * len(lengths) + len(runs)
        pair = (make_base, make_cache)
        for cell in retrieval_cells(model, tokenizer, lengths, *pair, count=prompts, seed=seed):
            cells.append(cell)
            progress("tasks", len(cells) / steps)
        for cell in copy_cells(model, tokenizer, runs, *pair, seed=seed):
            cells.append(cell)
            progress("tasks", len(cells) / steps)
    outside = []
    if harness:
        progress("lm-evaluation-harness", 0.0)
        outside = harness_scores(
            model,
            tokenizer,
            harness,
            make_base,
            make_cache,
            folder=harness_folder,
            limit=harness_limit,
            chunk=chunk,
            seed=seed,
        )
    progress("generation", 0.0)
    starts = [ids[:, : min(256, ids.shape[1] - 1)] for ids in windows[:prompts]]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    found = _divergence(model, starts if new_tokens else [], make_base, make_cache, new_tokens)
    sensitivities, proposed = [], None
    if sweep:
        progress("sweep", 0.0)
        numbers = [x.layer for x in layers]

        def only(layer: int, k_bits: int, v_bits: int) -> TurboQuantCache:
            rest = [i for i in range(len(cache.layers)) if i != layer]
            bits = {"k_bits": k_bits, "v_bits": v_bits, "skip_layers": rest, "layer_bits": None}
            centers = options.get("key_center")
            if centers is not None:
                bits["key_center"] = {layer: centers[layer]}
            if options.get("metrics") is not None:
                bits["metrics"] = {layer: options["metrics"][layer]}
            return make_cache(**bits)

        sensitivities = sweep_layers(model, windows[:2], numbers, make_base, only, chunk)
        if budget is not None:
            small, _ = history_bytes(cache.layers[i] for i in numbers)
            shapes = {i: cache.layers[i].snapshot().shape[1::2] for i in numbers}
            proposed = propose_bits(sensitivities, shapes, budget - (coded - small))
    return Report(
        model=name,
        baseline=baseline,
        dataset=dataset,
        dtype=str(model.dtype).removeprefix("torch."),
        cache={k: v for k, v in options.items() if k not in ("key_center", "metrics")}
        | {name: options.get(name) is not None for name in ("key_center", "metrics")},
        base_bytes_per_token=plain,
        bytes_per_token=coded,
        layers=layers,
        scores=summarize(parts),
        tasks=cells,
        divergence=found,
        generated=new_tokens,
        limits=limits or {},
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        seconds=time.perf_counter() - start,
        sweep=sensitivities,
        layer_bits=proposed,
        harness=outside,
    )
