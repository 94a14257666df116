"""Working memory is at most a tenth of input and output."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tq_core import (
    CodeIndex,
    Encoded,
    InnerProductQuantizer,
    MSEQuantizer,
    PageLayout,
    decode_record,
    encode_record,
)


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """Enough vectors that blocks of them are small: 77 MB."""
    return np.ones((150_000, 128), dtype=np.float32)


def working_memory(call: Callable[[], Any], given: int) -> float:
    """Peak memory over that of input and output."""
    tracemalloc.start()
    try:
        out = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    parts = out if isinstance(out, tuple) else (out,)
    return (given + peak) / (given + sum(part.nbytes for part in parts))


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("rotation", ["haar", "hadamard"])
def test_memory_of_encode_and_decode(many: np.ndarray, compute: str, rotation: str) -> None:
    quantizer = MSEQuantizer(128, 4, rotation, compute_dtype=compute)
    quantizer.decode(quantizer.encode(many[:5000]))  # tables are built once
    assert working_memory(lambda: quantizer.encode(many), many.nbytes) < 1.1
    encoded = quantizer.encode(many[:50_000])
    assert working_memory(lambda: quantizer.decode(encoded), encoded.nbytes) < 1.1


def test_memory_of_the_sketch(many: np.ndarray) -> None:
    quantizer = InnerProductQuantizer(128, 4)
    quantizer.decode(quantizer.encode(many[:5000]))
    encoded = quantizer.encode(many[:50_000])
    assert working_memory(lambda: quantizer.decode(encoded), encoded.nbytes) < 1.1


def test_memory_of_pages(many: np.ndarray) -> None:
    layout, x = PageLayout(128, 4, 3), many[:80_000].reshape(-1, 16, 128)
    few = encode_record(x[:500], x[:500], layout)
    decode_record(few, layout)
    assert working_memory(lambda: encode_record(x, x, layout), 2 * x.nbytes) < 1.1
    records = encode_record(x[:2000], x[:2000], layout)
    assert working_memory(lambda: decode_record(records, layout), records.nbytes) < 1.1


def test_memory_of_search() -> None:
    """A million codes: the search of the documents."""
    quantizer = MSEQuantizer(200, 4, scale="unbiased", compute_dtype="float32")
    index = CodeIndex(quantizer)
    index.add(np.ones((100, 200), dtype=np.float32))
    q = np.ones((4, 200), dtype=np.float32)
    index.search(q, 10)
    data = np.random.default_rng(0).integers(0, 256, (1_000_000, 100), dtype=np.uint8)
    index._parts = [Encoded(data, np.ones(len(data), dtype=np.float32), 200, 4)]
    assert working_memory(lambda: index.search(q, 10), index.nbytes) < 1.1
