"""Nearest neighbours on codes: exact queries against quantized vectors (asymmetric scoring).

For a query q the score of a vector with codes c and scale s is ``s Σ_j (Rq)_j centroid[c_j]``. The
products are looked up: one table of 256 entries for each packed byte where the bits divide 8, one of
``2**bits`` entries for each coordinate otherwise. No vector is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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

_ROWS = 1 << 14  # database vectors scored at once
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

    def _tables(self, coefficients: Float, values: Float) -> Float:
        """Sums of ``coefficients[j] * values[code_j]`` for every state of every lookup unit."""
        bits, dim = self.quantizer.bits, self.quantizer.dim
        table = coefficients[..., None] * values
        if 8 % bits:
            return np.asarray(table, dtype=np.float64)
        group = 8 // bits
        pad = -dim % group
        if pad:
            zeros = np.zeros((*table.shape[:-2], pad, len(values)))
            table = np.concatenate([table, zeros], axis=-2)
        table = table.reshape(*table.shape[:-2], (dim + pad) // group, group, len(values))
        state = np.arange(256)
        merged = np.zeros((*table.shape[:-2], 256))
        for i in range(group):
            merged += table[..., i, (state >> (bits * i)) & (2**bits - 1)]
        return merged

    def _lookup(self, table: Float, units: NDArray[np.uint8]) -> Float:
        total = np.zeros(len(units))
        for j in range(units.shape[1]):
            total += table[j][units[:, j]]
        return total

    def _units(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        bits = self.quantizer.bits
        return data if 8 % bits == 0 else unpack_bits(data, bits, self.quantizer.dim)

    def scores(self, queries: ArrayLike) -> Float:
        """Scores of all vectors, float64 [..., len(self)], for queries [..., dim]."""
        q = as_vectors(queries, self.quantizer.dim, "queries").astype(np.float64)
        flat = q.reshape(math.prod(q.shape[:-1]), q.shape[-1])
        out = np.empty((len(flat), len(self)))
        for row in range(0, len(flat), _QUERIES):
            for start, block in self._blocks(flat[row : row + _QUERIES]):
                out[row : row + len(block), start : start + block.shape[1]] = block
        return out.reshape(*q.shape[:-1], len(self))

    def _blocks(self, queries: Float) -> Iterator[tuple[int, Float]]:
        """Scores of blocks of vectors, each with the id of its first vector."""
        book = self.quantizer.codebook
        table = self._tables(self.quantizer.rotation.apply(queries), book.centroids)
        squares = self._tables(np.ones(self.quantizer.dim), book.centroids**2)
        own = np.einsum("ij,ij->i", queries, queries)[:, None]
        first = 0
        for part in self._parts:
            for start in range(0, len(part.scales), _ROWS):
                units = self._units(part.data[start : start + _ROWS])
                scales = part.scales[start : start + _ROWS].astype(np.float64)
                block = np.stack([self._lookup(one, units) for one in table])
                if self.metric == "ip":
                    block *= scales
                elif self.metric == "l2":
                    norms = scales * scales * self._lookup(squares, units)
                    block = own - 2.0 * scales * block + norms
                else:
                    lengths = np.sqrt(np.where(own == 0.0, 1.0, own) * self._lookup(squares, units))
                    block = np.where(scales == 0.0, 0.0, block / lengths)
                yield first, block
                first += len(scales)

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
        q = as_vectors(queries, self.quantizer.dim, "queries").astype(np.float64)
        flat = q.reshape(math.prod(q.shape[:-1]), q.shape[-1])
        sign = 1.0 if self.metric == "l2" else -1.0
        scores, ids = np.empty((len(flat), k)), np.empty((len(flat), k), dtype=np.int64)
        for row in range(0, len(flat), _QUERIES):
            part = flat[row : row + _QUERIES]
            best = np.empty((len(part), 0))
            kept = np.empty((len(part), 0), dtype=np.int64)
            for start, block in self._blocks(part):
                new = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
                best = np.concatenate([best, sign * block], axis=1)
                kept = np.concatenate([kept, new], axis=1)
                # A stable sort keeps equal scores in the order of their ids.
                order = np.argsort(best, axis=1, kind="stable")[:, :k]
                best = np.take_along_axis(best, order, axis=1)
                kept = np.take_along_axis(kept, order, axis=1)
            scores[row : row + len(part)] = sign * best
            ids[row : row + len(part)] = kept
        shape = (*q.shape[:-1], k)
        return scores.reshape(shape), ids.reshape(shape)
