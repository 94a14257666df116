"""Collect, split and tokenise the training corpus.

The corpus is the source code and documentation of the Python environment that runs this file:
every installed distribution under a permissive licence, and the standard library. The split is by
package, so that no file of a held-out package, nor a training file that shares much of its text
with one, is ever trained on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
HELD_OUT = (
    "click",
    "einops",
    "humanize",
    "networkx",
    "rich",
    "sortedcontainers",
    "tabulate",
    "werkzeug",
)
PERMISSIVE = {
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "BSD",
    "0BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "Apache-2.0",
    "PSF-2.0",
    "Python-2.0",
    "ISC",
    "Zlib",
    "CC0-1.0",
    "BSL-1.0",
}
CLASSIFIERS = {
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
FREE_TEXT = {
    r"(the )?mit( license)?": "MIT",
    r"(new |modified |3-clause )?bsd( license)?(\s*\(?3[- ]clause\)?)?": "BSD",
    r"bsd[- ]3[- ]clause( license)?": "BSD-3-Clause",
    r"bsd[- ]2[- ]clause( license)?": "BSD-2-Clause",
    r"apache([- ]|( license,? )|( software license ))?(version )?(v)?(2(\.0)?)?( license)?": (
        "Apache-2.0"
    ),
    r"psf(l|-2\.0)?": "PSF-2.0",
}
VENDORED = {"_vendor", "vendor", "_vendored", "vendored", "third_party", "externals", "extern"}
SUFFIXES = {".py", ".md", ".rst"}
SPLIT = r" ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Document:
    """One file of the corpus."""

    package: str
    path: str
    text: str


@dataclass(frozen=True)
class Package:
    """One source of documents: a distribution or the standard library."""

    name: str
    version: str
    licence: str | None
    reason: str
    files: tuple[tuple[str, Path], ...]
    licence_text: str


def licence_of(meta: Any) -> tuple[str | None, str]:
    """Return (SPDX-like licence, "") if permissive, else (None, why it is left out)."""
    expression = meta.get("License-Expression")
    if expression:
        words = re.sub(r"[()]|\b(AND|OR)\b|WITH LLVM-exception", " ", expression).split()
        strange = [word for word in words if word not in PERMISSIVE]
        return (None, f"licence {expression!r}") if strange else (expression, "")
    declared = [
        line.rsplit(" :: ", 1)[1]
        for line in meta.get_all("Classifier") or []
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    if declared:
        if all(name in CLASSIFIERS for name in declared):
            return " AND ".join(sorted({CLASSIFIERS[name] for name in declared})), ""
        return None, f"licence {declared!r}"
    free = " ".join((meta.get("License") or "").split())
    if free in PERMISSIVE:
        return free, ""
    for pattern, name in FREE_TEXT.items():
        if re.fullmatch(pattern, free, re.IGNORECASE):
            return name, ""
    return None, f"licence {free[:40]!r}" if free else "no licence stated"


def installed() -> Iterator[Package]:
    """Yield every distribution of this environment, then the standard library."""
    seen: set[str] = set()
    for dist in sorted(metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        name = (dist.metadata["Name"] or "").lower().replace("_", "-")
        if not name or name in seen:
            continue
        seen.add(name)
        licence, reason = licence_of(dist.metadata)
        files, notices = [], []
        for file in dist.files or []:
            parts = file.parts
            if re.match(r"(licen[cs]e|copying|notice)", file.name, re.IGNORECASE):
                if file.suffix not in {".py", ".pyc"}:
                    notices.append(Path(str(file.locate())))
            elif ".." not in parts and Path(file.name).suffix in SUFFIXES:
                files.append((file.as_posix(), Path(str(file.locate()))))
        text = "\n\n".join(t for t in map(read, notices) if t) if name in HELD_OUT else ""
        yield Package(name, dist.version, licence, reason, tuple(files), text)
    root = Path(sysconfig.get_paths()["stdlib"])
    own = [
        (path.relative_to(root).as_posix(), path)
        for path in sorted(root.rglob("*.py"))
        if not {"site-packages", "dist-packages"} & set(path.parts)
    ]
    yield Package("python", platform.python_version(), "PSF-2.0", "", tuple(own), "")


def read(path: Path) -> str | None:
    """Return a file's text, or None where it is unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def is_prose_or_code(text: str) -> bool:
    """Tell written text from tables, minified files and stubs."""
    if not 400 <= len(text) <= 300_000:
        return False
    lines = text.count("\n") + 1
    digits = sum(map(text.count, "0123456789"))
    return len(text) / lines < 100 and digits < 0.15 * len(text) and text.isascii()


def long_lines(text: str) -> list[str]:
    """Return the stripped lines that are long enough to identify a file."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= 30]


def documents_of(package: Package, limit: int) -> list[Document]:
    """Return up to ``limit`` characters of a package's files, in an order fixed by their hash."""
    ordered = sorted(package.files, key=lambda f: hashlib.sha256(f[0].encode()).digest())
    kept, total = [], 0
    for name, path in ordered:
        if VENDORED & set(Path(name).parts) or ".dist-info" in name:
            continue
        text = read(path)
        if text is None or not is_prose_or_code(text):
            continue
        total += len(text)
        if total > limit:
            break
        kept.append(Document(package.name, name, text))
    return kept


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; ``<|endoftext|>`` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_TOKENIZER: Tokenizer | None = None


def _start_worker(path: str) -> None:
    global _TOKENIZER
    _TOKENIZER = Tokenizer.from_file(path)


def _encode(text: str) -> NDArray[np.uint16]:
    assert _TOKENIZER is not None
    return np.array([0, *_TOKENIZER.encode(text).ids], dtype=np.uint16)


def encode_all(texts: list[str], tokenizer_path: Path) -> NDArray[np.uint16]:
    """Tokenise documents in parallel; each begins with ``<|endoftext|>``."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(
        os.cpu_count(), _start_worker, (str(tokenizer_path),)
    ) as pool:
        return np.concatenate(list(pool.imap(_encode, texts, chunksize=64)))


def held_out_sample(
    documents: list[Document], packages: dict[str, Package], characters: int
) -> dict[str, Any]:
    """Choose whole files of the held-out packages, about equally many characters from each."""
    names = sorted({document.package for document in documents})
    chosen = []
    for name in names:
        room = characters // len(names)
        for document in documents:
            if document.package == name and 1500 <= len(document.text) <= room:
                room -= len(document.text)
                chosen.append({"package": name, "path": document.path, "text": document.text})
    return {
        "packages": {
            name: {
                "version": packages[name].version,
                "licence": packages[name].licence,
                "licence_text": packages[name].licence_text,
            }
            for name in names
        },
        "documents": chosen,
    }


def build(out: Path, package_limit: int, total_limit: int, seed: int = 0) -> dict[str, Any]:
    """Build the corpus in ``out``.

    Writes ``train.npy`` and ``held_out.npy`` (uint16 token ids), ``tokenizer.json``,
    ``held_out.json`` (the evaluation text with its licences) and ``corpus.json`` (what was used).

    Parameters
    ----------
    out : Path
        Folder to write to.
    package_limit : int
        Most characters taken from one package.
    total_limit : int
        Most characters of training text; beyond it documents are left out at random.
    seed : int
        Seed of the order of the training documents.
    """
    out.mkdir(parents=True, exist_ok=True)
    packages = {package.name: package for package in installed()}
    held, train, rows = [], [], []
    for package in packages.values():
        documents = documents_of(package, package_limit) if package.licence else []
        (held if package.name in HELD_OUT else train).extend(documents)
    known = {line for document in held for line in long_lines(document.text)}
    kept, seen, alike = [], set(), []
    for document in train:
        lines = long_lines(document.text)
        shared = sum(line in known for line in lines)
        digest = hashlib.sha256(document.text.encode()).digest()
        if shared > 0.2 * len(lines) and shared > 4:
            alike.append(f"{document.package}:{document.path}")
        elif digest not in seen:
            seen.add(digest)
            kept.append(document)
    random.Random(seed).shuffle(kept)
    train, total = [], 0
    for document in kept:
        if total + len(document.text) <= total_limit:
            total += len(document.text)
            train.append(document)
    sample, size = [], 0
    for document in train:
        if size < 20_000_000:
            sample.append(document.text)
            size += len(document.text)
    tokenizer = train_tokenizer(sample)
    tokenizer_path = out / "tokenizer.json"
    tokenizer.save(str(tokenizer_path))
    train_ids = encode_all([document.text for document in train], tokenizer_path)
    held_ids = encode_all([document.text for document in held], tokenizer_path)
    np.save(out / "train.npy", train_ids)
    np.save(out / "held_out.npy", held_ids)
    sample_json = held_out_sample(held, packages, 230_000)
    (out / "held_out.json").write_text(json.dumps(sample_json, indent=0) + "\n", encoding="utf-8")
    for package in packages.values():
        part = held if package.name in HELD_OUT else train
        own = [document for document in part if document.package == package.name]
        rows.append(
            {
                "package": package.name,
                "version": package.version,
                "licence": package.licence,
                "left_out": package.reason or ("" if own else "no suitable file"),
                "split": "held-out" if package.name in HELD_OUT else "train",
                "files": len(own),
                "characters": sum(len(document.text) for document in own),
            }
        )
    report = {
        "python": platform.python_version(),
        "vocabulary": tokenizer.get_vocab_size(),
        "train_characters": total,
        "train_tokens": int(train_ids.size),
        "held_out_characters": sum(len(document.text) for document in held),
        "held_out_tokens": int(held_ids.size),
        "left_out_as_similar_to_held_out": alike,
        "packages": rows,
    }
    (out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
