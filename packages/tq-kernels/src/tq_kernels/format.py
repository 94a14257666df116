"""``KVFormat``: everything that fixes the bytes of a compressed KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor
from tq_core import Codebook, HaarRotation, HadamardRotation, PageLayout, TQError, page_codebook
from tq_core.rotation import Rotation
from tq_core.scale import check_scale

__all__ = ["KVFormat", "RotationName", "ScaleName"]

RotationName = Literal["hadamard", "haar"]
ScaleName = Literal["mse", "norm", "unbiased", "none"]


@lru_cache(maxsize=64)
def _rotation(kind: str, dim: int, seed: int, rounds: int) -> Rotation:
    return HaarRotation(dim, seed) if kind == "haar" else HadamardRotation(dim, seed, rounds)


@lru_cache(maxsize=64)
def _matrix(
    kind: str, dim: int, seed: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    matrix = torch.from_numpy(_rotation(kind, dim, seed, rounds).matrix.copy())
    return matrix.to(device=device, dtype=dtype).contiguous()


@dataclass(frozen=True)
class KVFormat:
    """Format of keys and values on pages (``docs/format.md``); invalid ones cannot be built.

    Parameters
    ----------
    head_dim : int
        Multiple of 16 from 16 to 256.
    k_bits, v_bits : int
        2, 3, 4 or 8.
    page_size : int
        Tokens a page, a multiple of 16.
    rotation : {"hadamard", "haar"}
    rounds : int
        Rounds of the Hadamard rotation.
    seed : int
        Seed of the rotation, 0 to 2**64 - 1.
    scale : {"unbiased", "mse", "norm", "none"}
        What the stored scale is matched to.

    Raises
    ------
    TQError
        For a value outside of these.

    Examples
    --------
    >>> fmt = KVFormat(128, k_bits=4, v_bits=3)
    >>> fmt.slot_bytes
    116
    """

    head_dim: int
    k_bits: int = 4
    v_bits: int = 4
    page_size: int = 16
    rotation: RotationName = "hadamard"
    rounds: int = 3
    seed: int = 0
    scale: ScaleName = "unbiased"

    def __post_init__(self) -> None:
        for name in ("head_dim", "k_bits", "v_bits", "page_size", "rounds", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TQError(f"{name}={value!r}: needs an int; convert it")
        if self.rotation not in ("hadamard", "haar"):
            raise TQError(f"rotation={self.rotation!r}: choose 'hadamard' or 'haar'")
        if self.rounds < 1:
            raise TQError(f"rounds={self.rounds}: needs at least 1; 3 is the default")
        if not 0 <= self.seed < 2**64:
            raise TQError(f"seed={self.seed}: needs 0 to 2**64 - 1")
        check_scale(self.scale)
        self.layout  # noqa: B018  (raises for the rest)

    @cached_property
    def layout(self) -> PageLayout:
        """Offsets of the planes and scales inside a record."""
        return PageLayout(self.head_dim, self.k_bits, self.v_bits, self.page_size)

    @property
    def slot_bytes(self) -> int:
        """Bytes a token and KV head, both scales included."""
        return self.layout.slot_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of a page and KV head."""
        return self.layout.record_bytes

    @cached_property
    def k_codebook(self) -> Codebook:
        """Codebook of the keys."""
        return page_codebook(self.head_dim, self.k_bits)

    @cached_property
    def v_codebook(self) -> Codebook:
        """Codebook of the values."""
        return page_codebook(self.head_dim, self.v_bits)

    @property
    def core_rotation(self) -> Rotation:
        """The rotation as a tq-core object (NumPy, float64)."""
        return _rotation(self.rotation, self.head_dim, self.seed, self.rounds)

    def rotation_matrix(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Matrix ``R`` [head_dim, head_dim] with ``y = R x``; cached, do not write to it."""
        kind, dim = self.rotation, self.head_dim
        return _matrix(kind, dim, self.seed, self.rounds, torch.device(device), dtype)

    def allocate_pages(
        self, num_pages: int, kv_heads: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Zeroed pages, uint8 [num_pages, kv_heads, record_bytes]; empty slots decode to zero."""
        if num_pages < 0 or kv_heads < 1:
            raise TQError(
                f"num_pages={num_pages}, kv_heads={kv_heads}: needs num_pages >= 0, kv_heads >= 1"
            )
        shape = (num_pages, kv_heads, self.record_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=device)
