"""TurboQuant for vLLM: an attention backend whose KV cache holds compressed pages.

``vllm serve MODEL --attention-backend CUSTOM`` uses it once the package is installed; settings are
environment variables, see `tq_vllm.settings`. Importing or installing the package changes
nothing else in vLLM.
"""

from __future__ import annotations

from tq_vllm.plugin import register

__all__ = ["register"]
