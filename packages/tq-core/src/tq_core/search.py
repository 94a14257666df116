"""Nearest neighbours on codes: exact queries against quantized vectors (asymmetric scoring).

For a query q the score of a vector with codes c and scale s is ``s Σ_j (Rq)_j centroid[c_j]``.
Vectors are read in blocks that fit the cache: packed bytes become float32 centroids by one table
look-up for every one or two of them, and one matrix product scores them for many queries at once.
What may be among the best is scored again in float64, so the result is exact. No vector is rotated
back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tq_core.errors import TQError
from tq_core.inputs import as_vectors
from tq_core.packing import unpack_bits
from tq_core.quantizer import Encoded, MSEQuantizer

__all__ = ["CodeIndex", "Metric"]

Float = NDArray[np.float64]
Metric = Literal["ip", "cosine", "l2"]

_ROWS = 1 << 11  # database vectors scored at once
_QUERIES = 64  # queries scored at once


class CodeIndex:
    """Flat index that holds only codes and scales.

    Parameters
    ----------
    quantizer : MSEQuantizer
        ``scale="unbiased"`` gives unbiased inner products, "mse" the least distance error.
    metric : {"ip", "cosine", "l2"}
        Larger is better for "ip" and "cosine", smaller for "l2" (squared distance).

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(1000, 64))
    >>> index = CodeIndex(MSEQuantizer(64, bits=4))
    >>> index.add(x)
    >>> scores, ids = index.search(x[:3], k=1)
    >>> ids.ravel().tolist()
    [0, 1, 2]
    """

    def __init__(self, quantizer: MSEQuantizer, metric: Metric = "ip") -> None:
        if metric not in ("ip", "cosine", "l2"):
            raise TQError(f"metric={metric!r}: choose 'ip', 'cosine' or 'l2'")
        self.quantizer = quantizer
        self.metric: Metric = metric
        self._parts: list[Encoded] = []

    def __len__(self) -> int:
        return sum(len(part.scales) for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales."""
        return sum(part.nbytes for part in self._parts)

    def add(self, x: ArrayLike) -> None:
        """Append vectors [n, dim]; ids count up in the order of addition."""
        array = np.asarray(x)
        if array.ndim != 2:
            raise TQError(f"shape {array.shape}: add vectors as [n, dim]")
        self._parts.append(self.quantizer.encode(array))

    @cached_property
    def _word(self) -> np.dtype[np.unsignedinteger]:
        """What is looked up at once: two bytes if vectors are whole ones and the table is small."""
        bits = self.quantizer.bits
        pairs = bits >= 4 and self.quantizer.dim * bits % 16 == 0
        return np.dtype("<u2" if pairs else "u1")

    @cached_property
    def _table(self) -> NDArray[np.void]:
        """Float32 centroids of every packed word, where the bits divide 8."""
        bits, width = self.quantizer.bits, 8 * self._word.itemsize
        states = np.arange(2**width)[:, None] >> (bits * np.arange(width // bits))
        centroids = self.quantizer.codebook.centroids.astype(np.float32)
        table = np.ascontiguousarray(centroids[states & (2**bits - 1)])
        return table.view(np.dtype((np.void, 4 * table.shape[1]))).ravel()

    def _centroids(
        self, data: NDArray[np.uint8], buffer: NDArray[np.complex128]
    ) -> NDArray[np.float32]:
        """Centroids of packed vectors, float32 [n, dim]; they lie in ``buffer`` where bits allow."""
        bits, dim = self.quantizer.bits, self.quantizer.dim
        if 8 % bits:
            return self.quantizer.codebook.decode(unpack_bits(data, bits, dim), np.float32)
        words = np.ascontiguousarray(data).view(self._word)
        out = buffer.view(self._table.dtype)[: words.size].reshape(words.shape)
        # Every word is a valid index; "clip" writes to out without a copy.
        np.take(self._table, words.astype(np.intp), out=out, mode="clip")
        return out.view(np.float32).reshape(len(data), -1)[:, :dim]

    def _blocks(self) -> Iterator[tuple[int, Encoded]]:
        """Blocks of vectors, each with the id of its first vector."""
        first = 0
        for part in self._parts:
            for start in range(0, len(part.scales), _ROWS):
                rows = slice(start, start + _ROWS)
                block = Encoded(part.data[rows], part.scales[rows], part.dim, part.bits)
                yield first, block
                first += len(block.scales)

    def _score(
        self, dots: NDArray[np.floating], scales: Float, squares: Float, own: Float
    ) -> Float:
        """Scores [q, n] from inner products of rotated queries and codewords."""
        if self.metric == "ip":
            return np.asarray(dots * scales, dtype=np.float64)
        if self.metric == "l2":
            return np.asarray(own - 2.0 * (dots * scales) + scales * scales * squares)
        lengths = np.sqrt(np.where(own == 0.0, 1.0, own) * squares)
        return np.where(scales == 0.0, 0.0, dots / lengths)

    def _exact(self, rotated: Float, own: Float, block: Encoded) -> Float:
        """Scores [q, n] in float64."""
        c = self.quantizer.codebook.decode(block.codes)
        squares = np.einsum("ij,ij->i", c, c)
        # einsum, not a matrix product: equal vectors get equal scores wherever they stand.
        dots = np.einsum("qj,nj->qn", rotated, c)
        return self._score(dots, block.scales.astype(np.float64), squares, own)

    def scores(self, queries: ArrayLike) -> Float:
        """Scores of all vectors, float64 [..., len(self)], for queries [..., dim]."""
        q = self._flat(queries)
        rotated = self.quantizer.rotation.apply(q)
        own = np.einsum("ij,ij->i", q, q)[:, None]
        out = np.empty((len(q), len(self)))
        for first, block in self._blocks():
            out[:, first : first + len(block.scales)] = self._exact(rotated, own, block)
        return out.reshape(*np.shape(queries)[:-1], len(self))

    def _flat(self, queries: ArrayLike) -> Float:
        q = as_vectors(queries, self.quantizer.dim, "queries").astype(np.float64)
        return q.reshape(math.prod(q.shape[:-1]), q.shape[-1])

    def search(self, queries: ArrayLike, k: int) -> tuple[Float, NDArray[np.int64]]:
        """Best ``k`` vectors of each query.

        Parameters
        ----------
        queries : float array [..., dim]
        k : int
            1 to ``len(self)``.

        Returns
        -------
        scores : float64 array [..., k]
            Best first.
        ids : int64 array [..., k]
            Equal scores are ordered by id.
        """
        if isinstance(k, bool) or int(k) != k or not 1 <= k <= len(self):
            raise TQError(f"k={k}: the index holds {len(self)} vectors; choose 1 to that number")
        q = self._flat(queries)
        scores, ids = np.empty((len(q), k)), np.empty((len(q), k), dtype=np.int64)
        for start in range(0, len(q), _QUERIES):
            some = slice(start, start + _QUERIES)
            rotated = self.quantizer.rotation.apply(q[some])
            own = np.einsum("ij,ij->i", q[some], q[some])[:, None]
            for n, found in enumerate(self._candidates(rotated, own, k)):
                row = slice(n, n + 1)
                exact = np.concatenate(
                    [
                        self._exact(rotated[row], own[row], self._take(found[i : i + _ROWS]))[0]
                        for i in range(0, len(found), _ROWS)
                    ]
                )
                order = np.lexsort((found, -self._sign * exact))[:k]
                scores[start + n], ids[start + n] = exact[order], found[order]
        shape = (*np.shape(queries)[:-1], k)
        return scores.reshape(shape), ids.reshape(shape)

    @property
    def _sign(self) -> float:
        return -1.0 if self.metric == "l2" else 1.0

    def _take(self, ids: NDArray[np.int64]) -> Encoded:
        """Vectors of ascending ids."""
        data, scales, first = [], [], 0
        for part in self._parts:
            chosen = ids[(ids >= first) & (ids < first + len(part.scales))] - first
            data.append(part.data[chosen])
            scales.append(part.scales[chosen].astype(np.float64))
            first += len(part.scales)
        quantizer = self.quantizer
        return Encoded(np.concatenate(data), np.concatenate(scales), quantizer.dim, quantizer.bits)

    def _candidates(self, rotated: Float, own: Float, k: int) -> list[NDArray[np.int64]]:
        """Ids, ascending, that hold the best ``k`` of each query.

        Scores are computed in float32 with a bound on their error. A vector is dropped when ``k``
        others are better even if every error is as large as its bound.
        """
        norms = np.sqrt(own)
        unit = (rotated / np.where(norms == 0.0, 1.0, norms)).astype(np.float32)
        precision = (self.quantizer.dim + 8) * 2.0**-23
        best = [_Best(k) for _ in rotated]
        floor = np.full((len(rotated), 1), -np.inf)
        book = self.quantizer.codebook
        longest = np.asarray(self.quantizer.dim * float(book.centroids[-1]) ** 2)
        width = -(-self.quantizer.dim * self.quantizer.bits // 8)
        buffer = np.empty(_ROWS * -(-width * 2 // self.quantizer.bits), dtype=np.complex128)
        for first, block in self._blocks():
            c = self._centroids(block.data, buffer)
            scales = block.scales.astype(np.float64)
            squares = longest  # an upper bound is enough for "ip"
            if self.metric != "ip":
                squares = np.einsum("ij,ij->i", c, c).astype(np.float64)
            score = self._score((c @ unit.T).T * norms, scales, squares, own)
            lengths = scales * np.sqrt(squares)
            if self.metric == "cosine":
                error = np.full((1, len(scales)), precision)
            elif self.metric == "ip":
                error = precision * norms * lengths
            else:
                error = precision * np.square(norms + lengths)
            high = score + error if self.metric != "l2" else error - score
            rows, columns = np.nonzero(high >= floor)
            if not len(rows):
                continue
            ends = np.flatnonzero(np.diff(rows, append=len(best))) + 1
            for begin, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
                row, some = rows[begin], columns[begin:end]
                slack = 2.0 * error[row if len(error) > 1 else 0, some]
                best[row].add(first + some, high[row, some], slack)
                floor[row] = best[row].floor
        return [one.ids for one in best]


class _Best:
    """Vectors that may be among the best ``k`` of one query."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.floor = -np.inf  # the k-th best score is at least this
        self.ids = np.empty(0, dtype=np.int64)
        self.high, self.low = np.empty(0), np.empty(0)

    def add(self, ids: NDArray[np.int64], high: Float, slack: Float) -> None:
        """Add vectors whose scores lie between ``high - slack`` and ``high``."""
        self.ids = np.concatenate([self.ids, ids])
        self.high = np.concatenate([self.high, high])
        self.low = np.concatenate([self.low, high - slack])
        if len(self.ids) < self.k:
            return
        self.floor = float(np.partition(self.low, -self.k)[-self.k])
        keep = self.high >= self.floor
        self.ids, self.high, self.low = self.ids[keep], self.high[keep], self.low[keep]
