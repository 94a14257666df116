"""The backend, as vLLM finds it."""

from __future__ import annotations

from tq_vllm.versions import check_vllm_version

check_vllm_version()

# What follows imports parts of vLLM that other versions may lack.
from tq_vllm.impl import TurboQuantImpl  # noqa: E402
from tq_vllm.metadata import TurboQuantMetadataBuilder  # noqa: E402
from tq_vllm.pages import TurboQuantPages  # noqa: E402

__all__ = ["TurboQuantBackend"]


class TurboQuantBackend(TurboQuantPages):
    """Attention on pages of codes."""

    @staticmethod
    def get_impl_cls() -> type[TurboQuantImpl]:
        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> type[TurboQuantMetadataBuilder]:
        return TurboQuantMetadataBuilder
