from __future__ import annotations

import pytest
from tq_core import TQError
from tq_vllm import register
from tq_vllm.versions import check_vllm_version


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0", "0.33.1", "0.32.0+cpu", "0.26.0", "dev"])
def test_supported_versions(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.28.3", "0.25.1", "0.27.0", "0.34.0", "1.0", "0.29.0rc1"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(TQError, match=f"vllm {version}: .*>= 0.29, < 0.34"):
        check_vllm_version(version)


def refuse() -> None:
    raise TQError("refused")


def test_an_unsupported_version_matters_only_if_the_backend_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tq_vllm.plugin.check_vllm_version", refuse)
    register()
    monkeypatch.setenv("TQ_K_BITS", "4")
    with pytest.raises(TQError, match="refused"):
        register()
