from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import tq_core

# The command line has dependencies of its own and is tested where they are installed.
MODULES = sorted(m.name for m in pkgutil.iter_modules(tq_core.__path__) if m.name != "cli")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(f"tq_core.{name}")
    result = doctest.testmod(module, extraglobs={"np": importlib.import_module("numpy")})
    assert result.failed == 0


def test_every_export_exists_and_is_documented() -> None:
    for name in tq_core.__all__:
        assert getattr(tq_core, name).__doc__, name
    assert any(module == "quantizer" for module in MODULES)
