"""Tasks that need the history: recalling a definition, and copying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tq_core import TQError

from tq_hf.argument import cache_argument
from tq_hf.models import retrieval_tasks
from tq_hf.verify.texts import start_token

__all__ = ["TaskCell", "copy_cells", "retrieval_cells", "task_sizes"]

CacheFactory = Callable[[], Any]
#: Tokens at the end of a prompt that are fed after the rest, so that they read codes.
LAST = 24
DEPTHS = (0.1, 0.5, 0.9)
_LEAD = 96  # least of `retrieval_tasks`


@dataclass(frozen=True)
class TaskCell:
    """A task at one length (and depth).

    Attributes
    ----------
    task : {"retrieval", "copy"}
    length : int
        Tokens of the prompt; of the run that is copied.
    depth : float or None
        Where the definition lies: 0 is the start of the prompt.
    count : int
        Prompts, or tokens copied.
    base_accuracy, accuracy : float
        Share that is right with the 16-bit cache and with this one.
    """

    task: str
    length: int
    depth: float | None
    count: int
    base_accuracy: float
    accuracy: float


def task_sizes(context: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of retrieval prompts and of copied runs that fit a model's context."""
    lengths = tuple(n for n in (512, 1536, 4096, 16384) if n + 128 <= context)[:3]
    return lengths, tuple(n for n in (64, 256) if 2 * n + 2 <= context)


@torch.no_grad()
def _best(model: Any, ids: Tensor, cache: Any, sizes: Sequence[int]) -> Tensor:
    """Most probable tokens [tokens] after each of ``ids`` [1, tokens], fed in pieces."""
    parts = [
        model(input_ids=part, use_cache=True, **cache_argument(model, cache)).logits[0].argmax(-1)
        for part in torch.split(ids, list(sizes), dim=1)
    ]
    return torch.cat(parts)


def retrieval_cells(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    make_base: CacheFactory,
    make_cache: CacheFactory,
    *,
    count: int = 3,
    seed: int = 0,
) -> Iterator[TaskCell]:
    """Recall a value by length of the prompt and depth of its definition.

    The prompt is fed at once but for its last tokens, as generation does; these and the answer
    read the history from the cache. See `tq_hf.models.retrieval_tasks`.

    Raises
    ------
    TQError
        For lengths below 256.
    """
    for length in lengths:
        if length < 256:
            raise TQError(f"length={length}: retrieval prompts need at least 256 tokens")
        for depth in DEPTHS:
            lead = max(_LEAD, round(length * depth))
            distance = max(48, length - lead)
            tasks = retrieval_tasks(
                tokenizer,
                distance,
                count,
                seed=seed,
                context=length + 256,
                lead=lead,
            )
            hits = [0, 0]
            for task in tasks:
                ids = torch.tensor([[*task.prompt, *task.answer]], device=model.device)
                size = ids.shape[1] - 1
                first = len(task.prompt) - LAST
                for i, make in enumerate((make_base, make_cache)):
                    best = _best(model, ids[:, :-1], make(), (first, size - first))
                    answer = ids[0, len(task.prompt) :]
                    hits[i] += int(torch.equal(best[len(task.prompt) - 1 :], answer))
            yield TaskCell("retrieval", length, depth, count, hits[0] / count, hits[1] / count)


def copy_cells(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    make_base: CacheFactory,
    make_cache: CacheFactory,
    *,
    seed: int = 0,
    chunk: int = 32,
) -> Iterator[TaskCell]:
    """Predict a run of random tokens when it comes a second time.

    The first 8 tokens of the repetition are not counted: they do not tell where it began.
    """
    rng = np.random.default_rng(seed)
    special = set(tokenizer.all_special_ids)
    vocabulary = np.array([i for i in range(len(tokenizer)) if i not in special])
    for length in lengths:
        run = [int(i) for i in rng.choice(vocabulary, length)]
        ids = torch.tensor([[*start_token(tokenizer), *run, *run]], device=model.device)
        size = ids.shape[1] - 1
        first = size - length
        rest = [min(chunk, size - at) for at in range(first, size, chunk)]
        right = []
        for make in (make_base, make_cache):
            best = _best(model, ids[:, :-1], make(), (first, *rest))
            right.append(float((best == ids[0, 1:])[-(length - 8) :].double().mean()))
        yield TaskCell("copy", length, None, length - 8, right[0], right[1])
