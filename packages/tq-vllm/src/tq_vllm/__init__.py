"""TurboQuant for vLLM: reserves the package's name; it has no attention backend.

Importing it changes nothing in vLLM. `register` raises, so that nobody serves a 16-bit cache and
takes it for a compressed one.
"""

from __future__ import annotations

from typing import NoReturn

__all__ = ["BackendUnavailableError", "register"]


class BackendUnavailableError(RuntimeError):
    """The vLLM attention backend was asked for and is not part of this version."""


def register() -> NoReturn:
    """Refuse to register an attention backend with vLLM.

    Raises
    ------
    BackendUnavailableError
        Always.
    """
    raise BackendUnavailableError(
        "this version of tq-vllm has no attention backend for vLLM; use tq-hf with transformers, "
        "or vLLM's own --kv-cache-dtype"
    )
