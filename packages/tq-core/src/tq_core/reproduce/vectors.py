"""Data of the experiments: random directions, pairs of known inner product, clusters, real text."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import linalg

from tq_core.errors import TQError

__all__ = ["clusters", "library_texts", "pairs", "text_embeddings", "unit_vectors"]

Single = NDArray[np.float32]


def unit_vectors(n: int, dim: int, seed: int = 0) -> NDArray[np.float64]:
    """Independent uniform points of the unit sphere, float64 [n, dim]."""
    x = np.random.default_rng(seed).standard_normal((n, dim))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def pairs(
    n: int, dim: int, product: float, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors x, y [n, dim] with inner product ``product`` in every row."""
    x = unit_vectors(n, dim, seed)
    z = np.random.default_rng(seed + 1).standard_normal((n, dim))
    z -= np.einsum("ij,ij->i", x, z)[:, None] * x
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return x, product * x + np.sqrt(1.0 - product**2) * z


def clusters(n: int, dim: int, seed: int = 0, centres: int = 100) -> Single:
    """Unit vectors float32 [n, dim] in clusters, as embeddings lie.

    Centres and the spread around them have a power-law spectrum in a random basis given by the
    order of coordinates; a shared offset makes the mean differ from zero.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.4
    middle = rng.standard_normal((centres, dim)) * spectrum
    x = middle[rng.integers(centres, size=n)]
    x += 0.6 * rng.standard_normal((n, dim)) * spectrum
    x += 0.5 * rng.standard_normal(dim) * spectrum
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)


def library_texts(limit: int) -> list[str]:
    """Source of functions and classes of the Python standard library, in order of path."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno:
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if len(text) > 200:
                    texts.append(text)
        if len(texts) >= limit:
            break
    return texts[:limit]


def text_embeddings(texts: list[str], dim: int) -> Single:
    """Embeddings of texts by latent semantic analysis, unit vectors float32 [n, dim].

    Words weighted by log frequency and inverse document frequency, then a truncated singular value
    decomposition. Nothing is downloaded.

    References
    ----------
    Deerwester et al., "Indexing by latent semantic analysis", JASIS 41 (1990).
    """
    vocabulary: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for word in "".join(c if c.isalpha() else " " for c in text.lower()).split():
            rows.append(row)
            columns.append(vocabulary.setdefault(word, len(vocabulary)))
    counts = sparse.coo_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(vocabulary))
    ).tocsr()
    documents = np.asarray((counts > 0).sum(axis=0)).ravel()
    counts = counts[:, documents >= 3]
    if min(counts.shape) <= dim:
        raise TQError(f"{len(texts)} texts: too few for {dim} dimensions; take more texts")
    counts.data = np.log1p(counts.data)
    weighted = counts @ sparse.diags(np.log(len(texts) / documents[documents >= 3]))
    start = np.random.default_rng(0).standard_normal(min(counts.shape))
    u, s, _ = linalg.svds(weighted, k=dim, v0=start)
    # A singular vector may have either sign: that of its largest number is made positive.
    largest = u[np.argmax(np.abs(u), axis=0), np.arange(dim)]
    x = u * (s * np.sign(largest))
    length = np.linalg.norm(x, axis=1)
    x = x[length > 1e-6 * float(length.max())]
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)
