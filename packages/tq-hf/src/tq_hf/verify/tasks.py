"""Tasks that need the history: recalling definitions, and copying."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tq_core import TQError

from tq_hf.argument import cache_argument
from tq_hf.models.quality import CacheFactory
from tq_hf.verify.recall import recall_prompt
from tq_hf.verify.texts import start_token

__all__ = ["TaskCell", "copy_cells", "retrieval_cells", "task_sizes"]

#: Definitions that a prompt asks for, and its tokens for each that it defines.
QUESTIONS, SPACING = 12, 24
#: Where definitions lie, on average, in the thirds of a prompt.
DEPTHS = (0.17, 0.5, 0.83)


@dataclass(frozen=True)
class TaskCell:
    """A task at one length (and depth).

    Attributes
    ----------
    task : {"retrieval", "copy"}
    length : int
        Tokens of the prompt before its questions; of the run that is copied.
    depth : float or None
        Middle of the third of the prompt in which the definitions lie: 0 is its start.
    count : int
        Values asked for, or tokens copied.
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
    """Lengths of retrieval prompts and of copied runs that fit a model's context.

    24 tokens are left for a question with its answer.
    """
    lengths = tuple(n for n in (512, 1536, 4096) if n + 24 * QUESTIONS <= context)
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
    chunk: int = 32,
) -> Iterator[TaskCell]:
    """Recall values by length of the prompt and depth of their definitions.

    A prompt is fed at once, as generation does; the questions read it from the cache. See
    `tq_hf.verify.recall.recall_prompt`.

    Parameters
    ----------
    model, tokenizer
    lengths : sequence of int
    make_base, make_cache : callable
        Return empty caches.
    count : int
        Prompts of a length.
    seed : int
    chunk : int
        Tokens of the questions fed at a time.

    Raises
    ------
    TQError
        For lengths below 512.
    """
    for length in lengths:
        if length < 512:
            raise TQError(f"length={length}: retrieval prompts need at least 512 tokens")
        hits = {depth: [0, 0, 0] for depth in DEPTHS}
        for number in range(count):
            prompt = recall_prompt(
                tokenizer,
                length,
                definitions=length // SPACING,
                questions=QUESTIONS,
                seed=seed + number,
            )
            ids = torch.tensor([prompt.ids], device=model.device)
            rest = ids.shape[1] - 1 - prompt.context
            sizes = (prompt.context, *(min(chunk, rest - at) for at in range(0, rest, chunk)))
            found = [_best(model, ids[:, :-1], make(), sizes) for make in (make_base, make_cache)]
            for answer in prompt.answers:
                cell = hits[DEPTHS[min(2, 3 * answer.place // length)]]
                cell[2] += 1
                for i, best in enumerate(found):
                    value = ids[0, answer.start : answer.stop]
                    cell[i] += int(torch.equal(best[answer.start - 1 : answer.stop - 1], value))
        for depth, (base, ours, asked) in hits.items():
            if asked:
                yield TaskCell("retrieval", length, depth, asked, base / asked, ours / asked)


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
