"""Small models for the tests of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tq_hf.models import load_model


def pytest_configure(config: pytest.Config) -> None:
    """A cache goes to a model under the name that its transformers asks for."""
    line = "error:`past_key_values` is deprecated:FutureWarning"
    config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def _first_layers(dtype: torch.dtype) -> Any:
    """The trained model without all but its first two layers, and its tokenizer."""
    model, tokenizer = load_model("tiny", dtype=dtype)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model, tokenizer


@pytest.fixture(scope="session")
def trained() -> Any:
    """In float64, so that rounding does not move numbers across the boundaries of codes."""
    return _first_layers(torch.float64)


@pytest.fixture(scope="session")
def single() -> Any:
    """In float32; transformers' eager masks need it."""
    return _first_layers(torch.float32)


@pytest.fixture(params=["sdpa", "eager", "turboquant"])
def model(request: pytest.FixtureRequest, trained: Any, single: Any) -> Any:
    """A model with each attention implementation."""
    chosen = (single if request.param == "eager" else trained)[0]
    chosen.set_attn_implementation(request.param)
    return chosen
