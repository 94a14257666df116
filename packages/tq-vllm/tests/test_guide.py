"""The serving guide says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version
from tq_vllm.settings import Settings
from tq_vllm.versions import FIRST, OLDER, UNTIL

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def test_settings() -> None:
    found = set(re.findall(r"`(TQ4?_[A-Z_]+)`", GUIDE))
    assert found == {f"TQ_{n.upper()}" for n in Settings.model_fields} | {
        "TQ4_K_BITS",
        "TQ4_V_BITS",
    }


def test_versions() -> None:
    (first, last, older), *_ = re.findall(r"vLLM (\d\.\d+) to\s+(\d\.\d+), or (\d\.\d+)", GUIDE)
    assert (first, older) == (FIRST, OLDER)
    assert Version(last).minor + 1 == Version(UNTIL).minor
    package = (ROOT / "packages" / "tq-vllm" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"vllm>={FIRST},<{UNTIL}"' in package
