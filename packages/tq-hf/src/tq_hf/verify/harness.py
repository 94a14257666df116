"""Tasks of lm-evaluation-harness, run with a compressed cache and with a 16-bit one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from tq_core import TQError

from tq_hf.argument import cache_argument
from tq_hf.models.quality import CacheFactory, chunked_logits

__all__ = ["HarnessScore", "harness_model", "harness_scores"]


@dataclass(frozen=True)
class HarnessScore:
    """A metric of a task, as the harness names them.

    Attributes
    ----------
    task, metric : str
    base, value : float
        With the 16-bit cache and with the compressed one.
    """

    task: str
    metric: str
    base: float
    value: float


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise TQError(
            f"lm-evaluation-harness cannot be imported ({error}): install it with "
            "pip install 'tq-hf[tasks]'"
        ) from None


def harness_model(
    model: Any, tokenizer: Any, make_cache: CacheFactory, *, chunk: int = 32, batch_size: int = 1
) -> Any:
    """A model for ``lm_eval.simple_evaluate`` that reads its history from a cache of its own.

    The harness scores a text in one forward pass, in which no token would read a code. Here the
    text is fed ``chunk`` tokens at a time, so that what a chunk sees of earlier ones comes out of
    the cache. Generation passes the cache to ``model.generate``; the prompt is then fed at once,
    as in use.

    Parameters
    ----------
    model, tokenizer
        A causal language model.
    make_cache : callable
        Returns an empty cache; called for every batch.
    chunk : int
        Tokens fed at a time.
    batch_size : int
        Texts scored at once; generation with left padding counts the padding as sinks.

    Raises
    ------
    TQError
        If the harness is not installed.
    """
    found = _module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    generate = found._model_generate

    def call(ids: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        return chunked_logits(model, ids, make_cache, chunk)

    def generate_cached(context: Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
        return generate(context, max_length, stop, **options, **cache_argument(model, make_cache()))

    found._model_call = call
    found._model_generate = generate_cached
    return found


def harness_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    make_base: CacheFactory,
    make_cache: CacheFactory,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    chunk: int = 32,
    seed: int = 0,
) -> list[HarnessScore]:
    """Run tasks of lm-evaluation-harness with both caches.

    Parameters
    ----------
    model, tokenizer
    tasks : sequence of str
        Names as the harness lists them.
    make_base, make_cache : callable
        Return empty caches, the 16-bit one and the compressed one.
    folder : path, optional
        Folder of YAML files that define more tasks.
    limit : int, optional
        Examples of a task; all by default.
    chunk : int
        Tokens fed at a time.
    seed : int
        Seed of few-shot examples.

    Raises
    ------
    TQError
        If the harness is not installed, or does not know a task.
    """
    harness = _module("lm_eval")
    if folder is not None and not folder.is_dir():
        raise TQError(
            f"tasks are looked for in {folder}, which is no folder; give one of YAML files"
        )
    manager = _module("lm_eval.tasks").TaskManager(
        include_path=None if folder is None else str(folder)
    )
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise TQError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm_eval ls tasks` lists "
            "them, and --tasks-folder adds yours"
        )
    base, ours = (
        harness.simple_evaluate(
            model=harness_model(model, tokenizer, make, chunk=chunk),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            fewshot_random_seed=seed,
        )["results"]
        for make in (make_base, make_cache)
    )
    return [
        HarnessScore(task, metric.partition(",")[0], float(before), float(ours[task][metric]))
        for task, metrics in base.items()
        for metric, before in metrics.items()
        if isinstance(before, float | int) and "," in metric and "_stderr" not in metric
    ]
