"""Generated training sequences that teach copying and retrieval over the whole context.

Definitions are scattered among real code and asked for again at any later distance; other
sequences repeat a run of tokens. Names that `is_reserved` marks are never used here: they belong
to the evaluation in ``tq_hf.models``, which applies the same rule.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATES = (
    ("NAME_{upper} = {number}\n", "assert NAME_{upper} == {number}\n"),
    ("NAME_{upper} = {number}\n", "print(NAME_{upper})  # {number}\n"),
    ("{upper} = {number}\n", "assert {upper} == {number}\n"),
    ('table["{lower}"] = {number}\n', 'assert table["{lower}"] == {number}\n'),
    ('    "{lower}": "{word}",\n', '    assert config["{lower}"] == "{word}"\n'),
    ("def get_{lower}():\n    return {number}\n", "assert get_{lower}() == {number}\n"),
    ('{lower}_name = "{word}"\n', 'assert {lower}_name == "{word}"\n'),
)


def is_reserved(name: str) -> bool:
    """Tell whether a name (four capital letters) is kept for the evaluation."""
    return sum(map(ord, name)) % 5 == 0


def letters(rng: np.random.Generator) -> str:
    """Draw four capital letters."""
    return "".join(UPPER[i] for i in rng.integers(0, 26, 4))


def definition(rng: np.random.Generator) -> tuple[str, str]:
    """Draw a definition and the line that uses it."""
    name = letters(rng)
    while is_reserved(name):
        name = letters(rng)
    first, later = TEMPLATES[rng.integers(len(TEMPLATES))]
    values = {
        "upper": name,
        "lower": name.lower(),
        "number": int(rng.integers(1000, 10000)),
        "word": letters(rng).lower(),
    }
    return first.format(**values), later.format(**values)


def code_slice(rng: np.random.Generator, code: NDArray[np.uint16], size: int) -> list[int]:
    """Return ``size`` consecutive tokens of the training corpus."""
    start = int(rng.integers(0, max(1, code.size - size)))
    return [int(i) for i in code[start : start + size]]


def retrieval_sequence(
    rng: np.random.Generator, tokenizer: Tokenizer, code: NDArray[np.uint16], length: int
) -> list[int]:
    """Scatter definitions and their uses among real code."""
    newline = tokenizer.encode("\n").ids
    remaining = int(rng.integers(3, 17))
    filler = float(rng.uniform(20, 160))
    uses: list[str] = []
    tokens: list[int] = [0]
    while len(tokens) < length:
        tokens += code_slice(rng, code, 1 + int(rng.exponential(filler))) + newline
        for _ in range(int(rng.integers(1, 4))):
            if remaining and (not uses or rng.random() < 0.5):
                remaining -= 1
                first, later = definition(rng)
                uses.append(later)
                tokens += tokenizer.encode(first).ids
            elif uses:
                tokens += tokenizer.encode(uses[rng.integers(len(uses))]).ids
    return tokens[:length]


def repeat_sequence(
    rng: np.random.Generator, vocabulary: int, code: NDArray[np.uint16], length: int
) -> list[int]:
    """Repeat a run of random tokens, or a slice of real code, until the sequence is full."""
    size = int(np.exp(rng.uniform(np.log(16), np.log(length / 2))))
    if rng.random() < 0.5:
        run = [int(i) for i in rng.integers(1, vocabulary, size)]
    else:
        run = code_slice(rng, code, size)
    tokens: list[int] = [0]
    while len(tokens) < length:
        tokens += run + code_slice(rng, code, int(rng.integers(0, 32)))
    return tokens[:length]


def _chunk(job: tuple[str, str, int, int, int]) -> NDArray[np.uint16]:
    tokenizer_path, code_path, count, length, seed = job
    tokenizer = Tokenizer.from_file(tokenizer_path)
    code = np.load(code_path, mmap_mode="r")
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        if rng.random() < 0.8:
            rows.append(retrieval_sequence(rng, tokenizer, code, length))
        else:
            rows.append(repeat_sequence(rng, tokenizer.get_vocab_size(), code, length))
    return np.array(rows, dtype=np.uint16)


def build(folder: Path, count: int, length: int, seed: int = 1) -> NDArray[np.uint16]:
    """Generate about ``count`` sequences; returns uint16 [sequences, length].

    ``folder`` holds ``tokenizer.json`` and ``train.npy`` as `corpus.build` writes them.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = os.cpu_count() or 1
    share = -(-count // workers)
    paths = str(folder / "tokenizer.json"), str(folder / "train.npy")
    jobs = [(*paths, share, length, seed * 10_000 + i) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.concatenate(pool.map(_chunk, jobs))
