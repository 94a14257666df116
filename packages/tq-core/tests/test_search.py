from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import CodeIndex, MSEQuantizer, TQError
from tq_core import search as search_module


def data(n: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim))


def brute_force(x: np.ndarray, q: np.ndarray, metric: str) -> np.ndarray:
    if metric == "l2":
        return np.sum((q[:, None, :] - x[None]) ** 2, axis=-1)
    dots = q @ x.T
    if metric == "cosine":
        dots /= np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
    return dots


@given(
    st.integers(2, 37),
    st.integers(1, 8),
    st.sampled_from(["ip", "cosine", "l2"]),
    st.sampled_from(["haar", "hadamard"]),
    st.integers(1, 12),
)
def test_scores_are_those_of_decoded_vectors(
    dim: int, bits: int, metric: str, rotation: str, k: int
) -> None:
    x, q = data(23, dim), data(3, dim, 1)
    quantizer = MSEQuantizer(dim, bits, rotation)
    index = CodeIndex(quantizer, metric)  # type: ignore[arg-type]
    index.add(x[:10])
    index.add(x[10:].astype(np.float32))
    decoded = np.concatenate(
        [
            quantizer.decode(quantizer.encode(x[:10])),
            quantizer.decode(quantizer.encode(x[10:].astype(np.float32))),
        ]
    )
    expected = brute_force(decoded, q, metric)
    np.testing.assert_allclose(index.scores(q), expected, atol=1e-9)
    scores, ids = index.search(q, k)
    assert scores.shape == ids.shape == (3, k)
    best = np.sort(expected if metric == "l2" else -expected, axis=1)[:, :k]
    np.testing.assert_allclose(scores if metric == "l2" else -scores, best, atol=1e-9)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), scores, atol=1e-9)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_blocks_agree(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = CodeIndex(MSEQuantizer(16, 4, "hadamard"), metric)  # type: ignore[arg-type]
    index.add(data(50, 16))
    q = data(7, 16, 2)
    whole = index.search(q, 9)
    monkeypatch.setattr(search_module, "_ROWS", 7)
    monkeypatch.setattr(search_module, "_QUERIES", 2)
    for a, b in zip(index.search(q, 9), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.sort(index.scores(q)), np.sort(index.search(q, 50)[0]))


def test_vectors_closer_than_the_precision_of_the_filter() -> None:
    """Scores that differ by less than float32 can tell still come in the right order."""
    q = data(1, 16)[0]
    index = CodeIndex(MSEQuantizer(16, 4))
    for factor in (1.0, 1.0 + 3e-9, 1.0 - 3e-9, 1.0 + 6e-9):
        index.add(q[None] * factor)
    index.add(data(200, 16, 3) * 1e-3)
    assert index.search(q, 3)[1].tolist() == [3, 1, 0]


def test_recall_grows_with_bits() -> None:
    x, q = data(2000, 64), data(100, 64, 3)
    truth = np.argsort(-(q @ x.T), axis=1)[:, :10]
    recall = []
    for bits in (1, 2, 4, 8):
        index = CodeIndex(MSEQuantizer(64, bits, "hadamard", "unbiased"))
        index.add(x)
        ids = index.search(q, 10)[1]
        recall.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, truth, strict=True)]))
    # Recall@10 has a standard error of about 1.5 %.
    assert recall[0] < recall[1] < recall[2] < recall[3]
    assert recall[2] > 0.8 and recall[3] > 0.97


def test_ties_go_to_the_lower_id() -> None:
    x = np.repeat(data(2, 8), 5, axis=0)
    index = CodeIndex(MSEQuantizer(8, 2))
    index.add(x)
    ids = index.search(x[9], 5)[1]
    assert ids.tolist() == [5, 6, 7, 8, 9]


def test_zero_vectors_and_shapes() -> None:
    x = np.zeros((3, 8))
    x[1] = 1
    index = CodeIndex(MSEQuantizer(8, 4), "cosine")
    index.add(x)
    assert len(index) == 3 and index.nbytes == 3 * (4 + 8)
    np.testing.assert_allclose(index.scores(np.ones(8)), [0, 1, 0], atol=0.02)
    assert np.all(index.scores(np.zeros((2, 1, 8))) == 0)
    assert index.search(np.zeros((2, 1, 8)), 2)[1].shape == (2, 1, 2)
    assert index.search(np.zeros((0, 8)), 2)[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda i: i.search(np.ones(8), 0), "k=0"),
        (lambda i: i.search(np.ones(8), 5), "holds 4"),
        (lambda i: i.search(np.ones(7), 1), "queries has shape"),
        (lambda i: i.add(np.ones(8)), r"\[n, dim\]"),
        (lambda i: CodeIndex(i.quantizer, "dot"), "dot"),
    ],
)
def test_errors(call: object, match: str) -> None:
    index = CodeIndex(MSEQuantizer(8, 2))
    index.add(np.ones((4, 8)))
    with pytest.raises(TQError, match=match):
        call(index)  # type: ignore[operator]
