from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import tq_kernels

ROOT = Path(tq_kernels.__file__).parent
MODULES = sorted(
    ".".join(("tq_kernels", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py" and ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_every_export_exists_and_is_documented() -> None:
    assert "tq_kernels.format" in MODULES
    for name in tq_kernels.__all__:
        assert getattr(tq_kernels, name).__doc__, name
