"""The versions of vLLM that the backend is written for."""

from __future__ import annotations

from packaging.version import Version
from tq_core import TQError

__all__ = ["FIRST", "OLDER", "UNTIL", "check_vllm_version", "supports_vllm"]

#: First supported version, and the first one that is not.
FIRST, UNTIL = "0.29", "0.34"
#: An older version that `tq_vllm.older_pages` makes work.
OLDER = "0.26"


def _installed() -> str:
    import vllm

    version: str = vllm.__version__
    return version


def supports_vllm(version: str | None = None) -> bool:
    """Tell whether a version of vLLM, by default the installed one's, is supported."""
    version = version or _installed()
    if version == "dev":  # a source tree without version, whose owner knows what it is
        return True
    found = Version(version)
    return Version(FIRST) <= found < Version(UNTIL) or found.release[:2] == Version(OLDER).release


def check_vllm_version(version: str | None = None) -> None:
    """Raise unless the version of vLLM, by default the installed one's, is supported.

    Raises
    ------
    TQError
        With the version found and the supported range.
    ImportError
        If vLLM is not installed.
    """
    version = version or _installed()
    if not supports_vllm(version):
        raise TQError(
            f"vllm {version}: tq-vllm supports vllm >= {FIRST}, < {UNTIL}, and {OLDER}; install "
            "one of these, or unset the TQ_ variables and --attention-backend CUSTOM"
        )
