from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests start without settings; those on an engine keep the engine's."""
    if "engine" not in request.fixturenames:
        for name in [n for n in os.environ if n.startswith(("TQ_", "TQ4_"))]:
            monkeypatch.delenv(name)
