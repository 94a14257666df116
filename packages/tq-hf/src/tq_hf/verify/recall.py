"""Prompts that define many values and then ask for some of them, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from tq_core import TQError

from tq_hf.models import held_out_text
from tq_hf.models.quality import is_reserved
from tq_hf.verify.texts import start_token

__all__ = ["Answer", "RecallPrompt", "recall_prompt"]


@dataclass(frozen=True)
class Answer:
    """Where a value stands in a prompt.

    Attributes
    ----------
    start, stop : int
        First token of the value in its question, and the first after it.
    place : int
        First token of its definition.
    """

    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class RecallPrompt:
    """Tokens of a prompt with its questions and their answers.

    Attributes
    ----------
    ids : tuple of int
    context : int
        Tokens before the first question.
    answers : tuple of Answer
    """

    ids: tuple[int, ...]
    context: int
    answers: tuple[Answer, ...]


def recall_prompt(
    tokenizer: Any, tokens: int, *, definitions: int, questions: int, seed: int = 0
) -> RecallPrompt:
    """Held-out code with lines such as ``NAME_ABCD = 1234`` in it, then ``assert NAME_ABCD == 1234``.

    Parameters
    ----------
    tokenizer
    tokens : int
        Tokens of code and definitions together, without questions and the start token.
    definitions : int
        Lines that define a value. More of them are harder to tell apart.
    questions : int
        Definitions that are asked for, in any order.
    seed : int

    Raises
    ------
    TQError
        If the definitions do not fit, or more is asked than is defined.
    """

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    if not 1 <= questions <= definitions:
        raise TQError(f"questions={questions}: needs 1 to {definitions}, the definitions")
    rng = np.random.default_rng([seed, definitions])
    names: list[str] = []
    while len(names) < definitions:
        name = "".join(chr(65 + i) for i in rng.integers(0, 26, 4))
        if is_reserved(name) and name not in names:
            names.append(name)
    values = [str(n) for n in rng.integers(1000, 10000, definitions)]
    newline = encode("\n")
    lines = [newline + encode(f"NAME_{n} = {v}\n") for n, v in zip(names, values, strict=True)]
    text, room = encode(held_out_text()), tokens - sum(map(len, lines))
    if not 0 <= room < len(text):
        raise TQError(
            f"tokens={tokens}: {definitions} definitions take {tokens - room} of them, and there "
            f"are {len(text)} tokens of code to put between; choose other numbers"
        )
    first = int(rng.integers(0, len(text) - room))
    text = text[first : first + room]
    ids, last, places = start_token(tokenizer), 0, []
    for cut, line in zip(sorted(rng.integers(0, room + 1, definitions)), lines, strict=True):
        ids += text[last:cut]
        places.append(len(ids))
        ids += line
        last = int(cut)
    ids += text[last:]
    context, answers = len(ids), []
    for i in rng.permutation(definitions)[:questions]:
        asked = f"assert NAME_{names[i]} == "
        whole = encode(f"{asked}{values[i]}\n")
        # A blank may be part of the value's first token.
        start = _common(whole, encode(asked))
        stop = _common(whole, encode(f"{asked}{values[i]}"))
        at = len(ids) + len(newline)
        answers.append(Answer(at + start, at + stop, places[i]))
        ids += newline + whole
    return RecallPrompt(tuple(ids), context, tuple(answers))


def _common(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning that both have."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
