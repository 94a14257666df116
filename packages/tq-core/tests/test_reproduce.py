from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from tq_core import HaarRotation, bounds, lloyd_max
from tq_core.reproduce import EXPERIMENTS, neighbours, vectors
from tq_core.reproduce.inner_product import reconstructor
from tq_core.reproduce.rabitq import RaBitQ, nearest_grid_codes
from tq_core.reproduce.rows import select


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def quick() -> dict[str, list[dict]]:
    return {name: one.measure(quick=True, note=quiet) for name, one in EXPERIMENTS.items()}


def test_distortion_lies_between_the_bounds_and_near_the_exact_value(quick: dict) -> None:
    rows = quick["distortion"]
    assert {r["bits"] for r in rows} == {1, 2, 3, 4, 5}
    for row in rows:
        assert row["lower_bound"] < row["mse"] < row["upper_bound"] or row["scale"] == "unbiased"
    for row in select(rows, scale="none"):
        assert row["exact"] == lloyd_max(128, row["bits"]).mse
        # Six standard errors, and 1 % for Hadamard in place of Haar rotations.
        assert abs(row["mse"] - row["exact"]) < 6 * row["standard_error"] + 0.01 * row["exact"]


def test_sketch_and_unbiased_scale_are_unbiased_and_the_mse_quantizer_is_not(quick: dict) -> None:
    rows = quick["inner-product"]
    for row in rows:
        if row["method"] != "mse":
            assert abs(row["bias"]) < 5 * row["bias_standard_error"]
    shrunk = select(rows, method="mse", bits=1, product=0.9)[0]
    assert shrunk["bias"] < -20 * shrunk["bias_standard_error"]
    for bits in range(1, 5):
        prod, unbiased = (
            select(rows, method=m, bits=bits, product=0.0)[0]["dim_times_squared_error"]
            for m in ("prod", "unbiased")
        )
        assert unbiased < 0.6 * prod
        exact = 64 * bounds.inner_product_error(64, bits)
        # 500 errors: the standard error of a variance is 6 %.
        assert prod == pytest.approx(exact, rel=0.3)


def test_histograms_are_complete(quick: dict) -> None:
    rows = quick["histograms"]
    for bits in range(1, 5):
        for method in ("mse", "prod", "unbiased"):
            some = select(rows, bits=bits, method=method)
            assert sum(r["share"] for r in some) == pytest.approx(1)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_grid_codes_are_the_best_of_all(bits: int) -> None:
    """Every codeword of the grid is tried in 4 dimensions."""
    unit = vectors.unit_vectors(60, 4, seed=bits)
    unit[0] = [0.0, 1.0, 0.0, 0.0]
    grid = np.array(list(itertools.product(range(2**bits), repeat=4))) - (2**bits - 1) / 2
    grid /= np.linalg.norm(grid, axis=1, keepdims=True)
    best = (unit @ grid.T).max(axis=1)
    found = nearest_grid_codes(unit, bits) - (2**bits - 1) / 2
    cosine = np.einsum("ij,ij->i", found, unit) / np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(cosine, best, atol=1e-12)


def test_rabitq_estimates_are_unbiased_over_rotations() -> None:
    """400 rotations; |z| < 5 fails by chance with probability 6e-7."""
    x = vectors.unit_vectors(3, 10, seed=2)
    q = vectors.unit_vectors(1, 10, seed=3)[0] + x[0]
    errors = np.array(
        [RaBitQ.fit(x, 2, HaarRotation(10, s)).decode()[0] @ q - x[0] @ q for s in range(400)]
    )
    assert abs(errors.mean()) < 5 * errors.std() / 20
    index = RaBitQ.fit(x, 2, HaarRotation(10, 0))
    assert index.nbytes == 3 * (3 + 8) + 40


def test_recall_counts_ranks() -> None:
    estimates = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    assert neighbours.recall(np.array([2, 0]), estimates) == {1: 0.5, 2: 1.0}


def test_recall_grows_with_k_and_bits(quick: dict) -> None:
    rows = quick["neighbours"]
    for row in rows:
        found = [row[f"recall_{k}"] for k in neighbours.KS]
        assert found == sorted(found) and found[0] >= 0 and found[-1] <= 1
    ours = [select(rows, bits=b, method="TurboQuant, unbiased scale") for b in (2, 4)]
    assert sum(r["recall_1"] for r in ours[0]) < sum(r["recall_1"] for r in ours[1])
    assert all(r["recall_1"] > 0.6 for r in ours[1])


def test_pairs_have_their_inner_product() -> None:
    x, y = vectors.pairs(50, 16, 0.3)
    np.testing.assert_allclose(np.einsum("ij,ij->i", x, y), 0.3)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1)


def test_text_embeddings_put_a_text_beside_its_likes() -> None:
    fruit = [f"apple pear plum {w} cherry" for w in ("red", "green", "sweet", "sour", "ripe")]
    tools = [f"hammer saw drill {w} wrench" for w in ("steel", "heavy", "sharp", "blunt", "old")]
    x = vectors.text_embeddings((fruit + tools) * 3, 2)
    cosine = x @ x.T
    same = np.arange(30) // 5 % 2
    assert np.all(cosine[same[:, None] == same] > 0.99)
    assert np.all(np.abs(cosine[same[:, None] != same]) < 0.5)
    assert np.all(x[np.argmax(np.abs(x[:, 0])), 0] > 0)
    with pytest.raises(ValueError, match="too few for 40 dimensions"):
        vectors.text_embeddings(fruit * 3, 40)


def test_estimates_are_those_of_the_quantizers() -> None:
    x = vectors.unit_vectors(20, 32)
    assert reconstructor("mse", 32, 3)(x).shape == (20, 32)
    assert not np.array_equal(reconstructor("prod", 32, 3)(x), reconstructor("mse", 32, 3)(x))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_figures_are_drawn(name: str, quick: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    EXPERIMENTS[name].draw(quick[name], tmp_path / "figure.png")
    head = (tmp_path / "figure.png").read_bytes()[:8]
    assert head == b"\x89PNG\r\n\x1a\n"


def test_command_writes_all_files(tmp_path: Path) -> None:
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    from tq_core.reproduce.command import reproduce

    runner, app = testing.CliRunner(), typer.Typer()
    app.command()(reproduce)
    run = runner.invoke(app, ["timing", "--quick", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "timing.json").read_text())
    assert result["quick"] and result["experiment"] == "timing"
    with (tmp_path / "timing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["seconds"]) for r in rows] == [r["seconds"] for r in result["rows"]]
    assert (tmp_path / "timing.png").exists()
    wrong = runner.invoke(app, ["nothing"])
    assert wrong.exit_code == 2 and "choose from" in wrong.output
