from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tq-core", deadline=None, max_examples=40)
settings.load_profile("tq-core")


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of the test vectors of the format."""
    for parent in Path(__file__).resolve().parents:
        folder = parent / "tests" / "vectors"
        if (folder / "pages.json").exists():
            return folder
    raise AssertionError("tests/vectors not found above the package; run from the repository")
