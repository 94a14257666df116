"""Perplexity, bits per byte and retrieval accuracy, with any cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tq_hf.argument import cache_argument
from tq_hf.models.loading import held_out_text

CacheFactory = Callable[[], Any]


@dataclass(frozen=True)
class Perplexity:
    """Total cross entropy of a text.

    Attributes
    ----------
    nats : float
        Sum of -log p over the predicted tokens.
    tokens : int
        Predicted tokens.
    bytes : int
        UTF-8 bytes of the text they spell.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean cross entropy per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text; comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class RetrievalTask:
    """A prompt that ends just before a value defined ``distance`` tokens earlier.

    Attributes
    ----------
    prompt, answer : tuple of int
        Token ids; the answer is the defined value.
    distance : int
        Tokens from the end of the definition to the end of the prompt.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    distance: int


@torch.no_grad()
def chunked_logits(
    model: Any, tokens: Tensor, make_cache: CacheFactory | None, chunk: int | None
) -> Tensor:
    """Return logits [batch, length, vocabulary], fed in chunks through a cache if one is given."""
    if make_cache is None:
        out: Tensor = model(input_ids=tokens, use_cache=False).logits
        return out
    cache = make_cache()
    parts = [
        model(input_ids=part, **cache_argument(model, cache), use_cache=True).logits
        for part in torch.split(tokens, chunk or tokens.shape[1], dim=1)
    ]
    return torch.cat(parts, dim=1)


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    make_cache: CacheFactory | None = None,
    chunk: int | None = None,
) -> Perplexity:
    """Measure a model's perplexity on texts, each predicted from its first token on.

    A text is cut into windows; every token is predicted exactly once, from the tokens before it in
    its window.

    Parameters
    ----------
    model, tokenizer
        As `load_model` returns them.
    texts : iterable of str, optional
        Documents; by default the held-out text.
    window : int, optional
        Tokens of a window; by default the model's context.
    max_tokens : int, optional
        Stop once this many tokens are predicted.
    make_cache : callable, optional
        Returns a fresh cache for a window; None runs without a cache.
    chunk : int, optional
        Tokens fed at a time through the cache. With a cache that compresses only what is past, a
        window fed at once never reads a compressed entry, so give a chunk then.

    Returns
    -------
    Perplexity
        Sums over all windows.

    Raises
    ------
    ValueError
        If there is nothing to predict.
    """
    window = window or model.config.max_position_embeddings
    nats, count, size = 0.0, 0, 0
    for text in [held_out_text()] if texts is None else texts:
        tokens = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        for start in range(0, len(tokens) - 1, window):
            if max_tokens is not None and count >= max_tokens:
                break
            piece = tokens[start : start + window + 1]
            if max_tokens is not None:
                piece = piece[: max_tokens - count + 1]
            ids = torch.tensor([piece], device=model.device)
            logits = chunked_logits(model, ids[:, :-1], make_cache, chunk)[0].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            nats += float(loss)
            count += len(piece) - 1
            size += _byte_length(tokenizer, piece[1:])
    if not count:
        raise ValueError("texts hold 0 tokens to predict; give text of at least one character")
    return Perplexity(nats, count, size)


def _byte_length(tokenizer: Any, ids: Sequence[int]) -> int:
    """Count bytes: each character of a byte-level token stands for one byte."""
    return sum(len(token) for token in tokenizer.convert_ids_to_tokens(list(ids)))


def is_reserved(name: str) -> bool:
    """Tell whether a name of four capital letters is kept out of training."""
    return sum(map(ord, name)) % 5 == 0


def _name(rng: np.random.Generator) -> str:
    while True:
        name = "".join(chr(65 + i) for i in rng.integers(0, 26, 4))
        if is_reserved(name):
            return name


def retrieval_tasks(
    tokenizer: Any,
    distance: int,
    count: int,
    *,
    seed: int = 0,
    definitions: int = 6,
    context: int = 2048,
    lead: int = 160,
) -> list[RetrievalTask]:
    """Generate prompts that define a symbol early and use it ``distance`` tokens later.

    A prompt is held-out source code with lines such as ``NAME_ABCD = 1234`` in it, and ends in
    ``assert NAME_ABCD ==``. The other definitions are distractors at random places, before and
    after the one that is asked for. Names are drawn from a set never used in training.

    Parameters
    ----------
    tokenizer
        As `load_model` returns it.
    distance : int
        Tokens from the end of the definition to the end of the prompt, at least 48.
    count : int
        Number of prompts; their lengths differ by a few tokens.
    seed : int
        Seed of names, values and places.
    definitions : int
        Definitions in a prompt, the one asked for included.
    context : int
        Upper limit of the prompt's length.
    lead : int
        Tokens before the definition, about; at least 96.

    Raises
    ------
    ValueError
        If the distance does not fit in the context or is below 48, or the lead is below 96.
    """
    if lead < 96:
        raise ValueError(f"lead={lead} must be at least 96, to hold the other definitions")
    if not 48 <= distance <= context - lead - 64:
        raise ValueError(
            f"distance={distance} must be from 48 to {context - lead - 64} for context={context}"
        )
    rng = np.random.default_rng([seed, distance])
    filler = tokenizer.encode(held_out_text(), add_special_tokens=False)

    def code(size: int) -> list[int]:
        start = int(rng.integers(0, len(filler) - size))
        return [int(i) for i in filler[start : start + size]]

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    newline = encode("\n")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    start = [] if first is None else [first]
    tasks: list[RetrievalTask] = []
    while len(tasks) < count:
        names = [_name(rng) for _ in range(definitions)]
        values = [str(rng.integers(1000, 10000)) for _ in range(definitions)]
        if len(set(names)) < definitions or len(set(values)) < definitions:
            continue
        lines = [newline + encode(f"NAME_{n} = {v}\n") for n, v in zip(names, values, strict=True)]
        question = newline + encode(f"assert NAME_{names[0]} == ")
        full = newline + encode(f"assert NAME_{names[0]} == {values[0]}\n")
        answer = full[len(question) :][: len(encode(values[0]))]
        if full[: len(question)] != question:
            question = full[: len(full) - len(encode(f"{values[0]}\n"))]
            answer = full[len(question) : -1]
        after = distance - len(question)
        late = [line for line in lines[1:] if rng.random() < distance / context]
        room = after - sum(map(len, late))
        while room < 0:
            room += len(late.pop())
        early = [line for line in lines[1:] if line not in late]
        before = lead - sum(map(len, early)) + sum(map(len, lines[1:]))
        prompt = [*start, *_scatter(rng, code(before), early), *lines[0]]
        prompt += [*_scatter(rng, code(room), late), *question]
        tasks.append(RetrievalTask(tuple(prompt), tuple(answer), distance))
    return tasks


def _scatter(rng: np.random.Generator, filler: list[int], lines: list[list[int]]) -> list[int]:
    """Insert lines into filler at random places, in order."""
    cuts = sorted(int(i) for i in rng.integers(0, len(filler) + 1, len(lines)))
    out, last = [], 0
    for cut, line in zip(cuts, lines, strict=True):
        out += filler[last:cut] + line
        last = cut
    return out + filler[last:]


def retrieval_accuracy(
    model: Any,
    tokenizer: Any,
    distances: Sequence[int] = (64, 128, 256, 512, 1024, 1536),
    *,
    count: int = 50,
    seed: int = 0,
    make_cache: CacheFactory | None = None,
    chunk: int | None = None,
) -> dict[int, float]:
    """Measure how often a model recalls a defined value exactly, by distance.

    A prompt counts as recalled if every token of the four-digit value is the model's most likely
    one, which is what greedy generation needs. Guessing among the values in the prompt recalls one
    in `retrieval_tasks`'s ``definitions``, guessing freely one in 9,000.

    Parameters
    ----------
    model, tokenizer
        As `load_model` returns them.
    distances : sequence of int
        Distances in tokens.
    count, seed : int
        Prompts a distance and their seed.
    make_cache, chunk
        As for `perplexity`.

    Returns
    -------
    dict of int to float
        Accuracy from 0 to 1 for each distance.
    """
    result = {}
    for distance in distances:
        hits = 0
        for task in retrieval_tasks(tokenizer, distance, count, seed=seed):
            ids = torch.tensor([[*task.prompt, *task.answer]], device=model.device)
            logits = chunked_logits(model, ids[:, :-1], make_cache, chunk)
            guess = logits[0, len(task.prompt) - 1 :].argmax(-1)
            hits += int(torch.equal(guess, ids[0, len(task.prompt) :]))
        result[distance] = hits / count
    return result
