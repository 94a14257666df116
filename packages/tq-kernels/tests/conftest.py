from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when a kernel is
# defined, so it is set before any test module imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tq_kernels import KVFormat

settings.register_profile("tq-kernels", deadline=None, max_examples=30, print_blob=True)
settings.load_profile("tq-kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU if there is one, else the CPU: where kernels are tested."""
    return DEVICE


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if DEVICE == "cuda" else [])])
def any_device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the GPU if there is one: where the references are tested."""
    return str(request.param)


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of the test vectors of the format."""
    for parent in Path(__file__).resolve().parents:
        folder = parent / "tests" / "vectors"
        if (folder / "pages.json").exists():
            return folder
    raise AssertionError("tests/vectors not found above the package; run from the repository")


Floats = NDArray[np.float64]
Check = Callable[..., None]


def _exact_units(x: Floats, fmt: KVFormat) -> tuple[Floats, Floats]:
    """Rotated vectors and their norms, by tq-core in float64."""
    peak = np.max(np.abs(x), axis=-1, keepdims=True, initial=0.0)
    exponent = np.frexp(peak)[1]
    y = fmt.core_rotation.apply(np.ldexp(x, -exponent))
    norm = np.sqrt(np.sum(y * y, axis=-1, keepdims=True))
    return y / np.where(norm == 0, 1.0, norm), np.ldexp(norm[..., 0], exponent[..., 0])


@pytest.fixture(scope="session")
def check_quantized() -> Check:
    """Check codes and scales of vectors against the definition, computed in float64.

    ``check(x, codes, scales, fmt, kind, distance)``: a coordinate of the unit vector may have the
    code on the other side of a boundary only if it is nearer to it than ``distance``. The scale is
    that of the codes as they are, within one unit in the last place of fp16.
    """

    def check(
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        fmt: KVFormat,
        kind: str,
        distance: float,
    ) -> None:
        book = fmt.k_codebook if kind == "k" else fmt.v_codebook
        values = x.detach().cpu().double().numpy().reshape(-1, fmt.head_dim)
        got = codes.cpu().numpy().reshape(-1, fmt.head_dim).astype(int)
        stored = scales.cpu().numpy().reshape(-1).astype(np.float64)
        units, norm = _exact_units(values, fmt)
        edges = np.concatenate([[-np.inf], book.boundaries, [np.inf]])
        assert got.min(initial=0) >= 0 and got.max(initial=0) < 2**book.bits
        inside = (units >= edges[got] - distance) & (units < edges[got + 1] + distance)
        assert inside.all(), (kind, np.argwhere(~inside)[0], units[~inside][0], got[~inside][0])
        c = book.centroids[got]
        unit_scale = {
            "mse": lambda: np.sum(units * c, -1) / np.sum(c * c, -1),
            "norm": lambda: 1 / np.sqrt(np.sum(c * c, -1)),
            "unbiased": lambda: 1 / np.where(norm == 0, 1.0, np.sum(units * c, -1)),
            "none": lambda: np.ones(len(c)),
        }[fmt.scale]()
        exact = unit_scale * norm
        ulp = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(exact, 2.0**-30))) - 10), 2.0**-24)
        error = np.abs(stored - exact)
        assert (error <= 0.51 * ulp + 1e-5 * exact).all(), (exact, stored)
        assert (stored[norm == 0] == 0).all()

    return check


def _families(rng: np.random.Generator, dim: int) -> Floats:
    """Dense, sparse, constant, huge, tiny and zero vectors [12, dim]."""
    rows = [rng.normal(size=dim) * 10.0 ** rng.integers(-3, 3) for _ in range(4)]
    one, two = np.zeros(dim), np.zeros(dim)
    one[rng.integers(dim)] = -3.0
    two[rng.permutation(dim)[:2]] = [1.0, -0.5]
    outlier = rng.normal(size=dim)
    outlier[rng.integers(dim)] = 100.0
    rows += [one, two, outlier, np.ones(dim), np.zeros(dim)]
    rows += [rng.normal(size=dim) * 2000.0, rng.normal(size=dim) * 1e-6]
    rows += [np.where(rng.integers(2, size=dim) == 0, 6e-8, -6e-8)]
    return np.stack(rows)


@pytest.fixture(scope="session")
def vector_families() -> Callable[[np.random.Generator, int], Floats]:
    """``families(rng, dim)``: 12 vectors of different kinds, adversarial ones among them."""
    return _families
