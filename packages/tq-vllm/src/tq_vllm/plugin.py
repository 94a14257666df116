"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""

from __future__ import annotations

from tq_vllm.settings import asked_for, load_settings
from tq_vllm.versions import check_vllm_version, supports_vllm

__all__ = ["BACKEND", "register"]

#: Where vLLM finds the backend.
BACKEND = "tq_vllm.backend.TurboQuantBackend"


def register() -> None:
    """Offer the backend to vLLM as ``CUSTOM``; may be called any number of times.

    vLLM's CPU platform ignores ``--attention-backend``, so there the backend takes the place of
    ``CPU_ATTN``, but only if a ``TQ_`` variable asks for it.

    Raises
    ------
    TQError
        If a ``TQ_`` variable asks for the backend and it cannot be had: unsupported version of
        vLLM, invalid settings. Never if none does.
    """
    asked = asked_for()
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError:
        if asked:
            check_vllm_version()
            raise
        return
    if asked:
        check_vllm_version()
        settings = load_settings()
        if current_platform.is_cpu() and settings.cpu:
            register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    custom = AttentionBackendEnum.CUSTOM
    if asked or not custom.is_overridden():
        register_backend(custom, BACKEND)  # which checks the version when it is loaded
    if supports_vllm():
        from tq_vllm.dtypes import register_dtypes

        register_dtypes()
