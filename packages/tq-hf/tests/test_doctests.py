"""The examples in the docstrings of the cache."""

from __future__ import annotations

import doctest

import tq_hf.cache


def test_examples() -> None:
    result = doctest.testmod(tq_hf.cache)
    assert result.attempted > 0
    assert result.failed == 0
