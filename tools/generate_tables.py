"""Write the tables of the documents from the committed result files.

A document holds ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; what is between them is
written by the function registered under that name.

Usage: ``python tools/generate_tables.py [--check]``; ``--check`` writes nothing and exits with 1 if
a document is not in step with the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md",)
MARKER = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table:\1 -->", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}


def table(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns the text of a table."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        if name in TABLES:
            raise ValueError(f"table {name!r} is registered twice; choose another name")
        TABLES[name] = function
        return function

    return register


def load(path: str) -> Any:
    """Read a result file, by its path from the repository's root."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


@table("models")
def models() -> str:
    """Quality of the trained models, and what rounding their keys does to it."""
    header = ("model", "bits per byte", "xz -9e", "recall at 1,536 tokens")
    keys = ("perplexity, 16-bit keys", "4-bit keys", "4-bit, mean subtracted")
    rows = []
    for name in ("tiny", "tiny-large-bias"):
        result = load(f"tools/train_tiny_lm/results/{name}-quality.json")
        rounded = result["key_quantization"]
        rows.append(
            (
                f"`{name}`",
                f"{result['held_out']['bits_per_byte']:.3f}",
                f"{result['compressors_bits_per_byte']['xz -9e']:.3f}",
                f"{result['retrieval']['accuracy']['1536']:.3f}",
                *(f"{rounded[k]['perplexity']:.2f}" for k in ("exact", "plain_4", "centred_4")),
            )
        )
    return markdown((*header, *keys), rows)


@table("demo")
def demo() -> str:
    """Size and quality of each cache, as `tq demo` measured them."""
    rows = [
        (
            row["name"],
            f"{row['perplexity']:.3f}",
            f"{row['agreement']:.1%}",
            f"{row['bytes_per_token']:,}",
            f"{row['ratio']:.2f}x",
            f"{row['projection_bytes'] / 2**30:.2f} GiB",
        )
        for row in load("benchmarks/results/demo.json")["caches"]
    ]
    header = ("cache", "perplexity", "same best token", "bytes a token", "ratio")
    return markdown((*header, "Llama-3.1-8B shape, 128k"), rows)


def render(text: str) -> str:
    """Return a document with its tables written anew.

    Raises
    ------
    ValueError
        If a marker names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; registered: {sorted(TABLES)}")
        return f"<!-- table:{name} -->\n{TABLES[name]()}<!-- /table:{name} -->"

    return MARKER.sub(replace, text)


def main(arguments: Sequence[str]) -> int:
    """Write or check every document."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(name)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"not in step with the results: {stale}; run tools/generate_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
