"""The versions of vLLM that the backend is written for."""

from __future__ import annotations

from packaging.version import Version
from tq_core import TQError

__all__ = ["FIRST", "OLDER", "UNTIL", "check_vllm_version"]

#: First supported version, and the first one that is not.
FIRST, UNTIL = "0.29", "0.34"
#: An older version that `tq_vllm.older_pages` makes work.
OLDER = "0.26"


def check_vllm_version(version: str | None = None) -> None:
    """Raise unless the version of vLLM, by default the installed one's, is supported.

    Raises
    ------
    TQError
        With the version found and the supported range.
    ImportError
        If vLLM is not installed.
    """
    if version is None:
        import vllm

        version = vllm.__version__
    if version == "dev":  # a source tree without version, whose owner knows what it is
        return
    found = Version(version)
    if not (
        Version(FIRST) <= found < Version(UNTIL) or found.release[:2] == Version(OLDER).release
    ):
        raise TQError(
            f"vllm {version}: tq-vllm supports vllm >= {FIRST}, < {UNTIL}, and {OLDER}; install "
            "one of these, or unset the TQ_ variables and --attention-backend CUSTOM"
        )
