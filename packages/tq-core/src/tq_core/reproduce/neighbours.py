"""Nearest neighbours: recall, build time and bytes of four methods (figure 5 of the paper)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tq_core.quantizer import InnerProductQuantizer, MSEQuantizer
from tq_core.reproduce.rabitq import RaBitQ
from tq_core.reproduce.rows import Note, Row, select
from tq_core.reproduce.vectors import clusters, library_texts, text_embeddings
from tq_core.rotation import make_rotation

__all__ = ["METHODS", "draw", "have_faiss", "measure", "recall"]

Single = NDArray[np.float32]
Built = tuple[Callable[[], Single], int]  # decodes all vectors; bytes held
KS = (1, 2, 4, 8, 16, 32, 64)


def _faiss() -> Any:
    return import_module("faiss")


def _turboquant(x: Single, bits: int) -> Built:
    quantizer = MSEQuantizer(x.shape[1], bits, "hadamard", "unbiased", compute_dtype=np.float32)
    encoded = quantizer.encode(x)
    return lambda: np.asarray(quantizer.decode(encoded, np.float32), np.float32), encoded.nbytes


def _with_sketch(x: Single, bits: int) -> Built:
    quantizer = InnerProductQuantizer(x.shape[1], bits, "hadamard")
    encoded = quantizer.encode(x)
    return lambda: np.asarray(quantizer.decode(encoded, np.float32), np.float32), encoded.nbytes


def _rabitq(x: Single, bits: int) -> Built:
    index = RaBitQ.fit(x, bits, make_rotation("hadamard", x.shape[1]))
    return index.decode, index.nbytes


def _product_quantization(x: Single, bits: int) -> Built:
    """8-bit codebooks, each of ``8 / bits`` coordinates; estimates are those of faiss' tables."""
    faiss = _faiss()
    dim = x.shape[1]
    quantizer = faiss.ProductQuantizer(dim, dim * bits // 8, 8)
    quantizer.cp.min_points_per_centroid = 1
    quantizer.cp.max_points_per_centroid = 39  # its default: 9,984 training vectors at most
    quantizer.train(x)
    codes = quantizer.compute_codes(x)
    return lambda: quantizer.decode(codes), codes.nbytes + 4 * 256 * dim


METHODS: dict[str, Callable[[Single, int], Built]] = {
    "TurboQuant, unbiased scale": _turboquant,
    "TurboQuant with sketch (paper)": _with_sketch,
    "RaBitQ": _rabitq,
    "product quantization": _product_quantization,
}


def have_faiss() -> bool:
    """Tell whether the peer for product quantization is installed (extra ``peers``)."""
    return find_spec("faiss") is not None


def recall(best: NDArray[np.int64], estimates: NDArray[np.floating]) -> dict[int, float]:
    """Share of queries whose true best vector is among the k of largest estimate, by k.

    Parameters
    ----------
    best : int array [q]
    estimates : float array [q, n]
    """
    own = np.take_along_axis(estimates, best[:, None], axis=1)
    rank = np.sum(estimates > own, axis=1)
    return {k: float(np.mean(rank < k)) for k in KS if k <= estimates.shape[1]}


def _data_sets(quick: bool, note: Note) -> dict[str, tuple[Single, Single]]:
    sizes = {64: (600, 20)} if quick else {200: (10000, 500), 1536: (4000, 300), 3072: (3000, 200)}
    sets = {}
    for dim, (count, queries) in sizes.items():
        data = clusters(count + queries, dim, seed=dim)
        sets[f"clusters, dim {dim}"] = (data[:count], data[count:])
    note("neighbours: embedding the standard library")
    texts = library_texts(400 if quick else 8000)
    dim = 64 if quick else 200
    data = np.random.default_rng(0).permutation(text_embeddings(texts, dim))
    held = 20 if quick else 500
    sets[f"Python library, dim {dim}"] = (data[held:], data[:held])
    return sets


def measure(quick: bool = False, note: Note = print) -> list[Row]:
    """Rows of data set, method and bits: recall of the best neighbour at k, seconds, bytes.

    Bytes are those of codes and scales of all vectors and of trained codebooks. Seconds are CPU
    time of training and encoding. Without faiss product quantization is left out.
    """
    rows = []
    for name, (x, q) in _data_sets(quick, note).items():
        best = np.argmax(q @ x.T, axis=1)
        for bits in (2, 4):
            for method, build in METHODS.items():
                if method == "product quantization" and not have_faiss():
                    note("neighbours: faiss is not installed; product quantization left out")
                    continue
                note(f"neighbours: {name}, {bits} bits, {method}")
                if method != "product quantization":
                    build(x[:32], bits)  # codebooks and rotations are made once and kept
                start = time.process_time()
                decode, nbytes = build(x, bits)
                seconds = time.process_time() - start
                found = recall(best, q @ decode().T)
                rows.append(
                    {
                        "data": name,
                        "vectors": len(x),
                        "dim": x.shape[1],
                        "bits": bits,
                        "method": method,
                        "bytes_per_vector": nbytes / len(x),
                        "seconds": seconds,
                        **{f"recall_{k}": share for k, share in found.items()},
                    }
                )
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Recall against k, one panel for each data set; dashed lines are 2 bits, full lines 4."""
    from tq_core.reproduce.figures import figure, save

    names = list(dict.fromkeys(r["data"] for r in rows))
    fig, panels = figure(len(names))
    for axes, name in zip(panels, names, strict=True):
        for n, method in enumerate(METHODS):
            for bits, style in ((2, "--"), (4, "-")):
                for row in select(rows, data=name, method=method, bits=bits):
                    ks = [k for k in KS if f"recall_{k}" in row]
                    axes.plot(
                        ks,
                        [row[f"recall_{k}"] for k in ks],
                        style,
                        color=f"C{n}",
                        label=method if bits == 4 else None,
                    )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="k", title=name)
        axes.set_xticks(KS, [str(k) for k in KS])
    panels[0].set_ylabel("recall of the best neighbour in k")
    panels[0].legend(fontsize=7, title="4 bits; dashed: 2 bits", title_fontsize=7)
    save(fig, path)
