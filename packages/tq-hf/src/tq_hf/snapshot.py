"""What one step of attention sees of a layer: 16-bit ends and codes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tq_kernels import KVFormat, TokenCodes, decode_tokens

from tq_hf.modes import exact

__all__ = ["Snapshot"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Keys and values of all tokens of a layer, past and new.

    Attributes
    ----------
    head : pair of tensors [batch, kv_heads, sink tokens, head_dim]
        Keys and values of the first tokens, as they came.
    parts : tuple of pairs of TokenCodes
        Codes of the tokens that follow; keys and values.
    tail : pair of tensors [batch, kv_heads, tokens, head_dim]
        The window and the new tokens, as they came.
    fmt : KVFormat or None
        Of the codes; None if there are none.
    key_center : float32 tensor [kv_heads, head_dim] or None
        What was subtracted from the keys before they were encoded.
    """

    head: tuple[Tensor, Tensor]
    parts: tuple[tuple[TokenCodes, TokenCodes], ...]
    tail: tuple[Tensor, Tensor]
    fmt: KVFormat | None
    key_center: Tensor | None

    @classmethod
    def of_dense(cls, keys: Tensor, values: Tensor) -> Snapshot:
        """A snapshot without codes of tensors [batch, kv_heads, tokens, head_dim]."""
        empty = (keys[..., :0, :], values[..., :0, :])
        return cls(empty, (), (keys, values), None, None)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        coded = sum(keys.tokens for keys, _ in self.parts)
        return self.head[0].shape[-2] + coded + self.tail[0].shape[-2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the keys, and of the values: [batch, kv_heads, tokens, head_dim]."""
        batch, kv_heads, _, dim = self.tail[0].shape
        return batch, kv_heads, self.tokens, dim

    @exact
    def dense(self, kind: Literal["k", "v"]) -> Tensor:
        """Keys or values [batch, kv_heads, tokens, head_dim] with the codes decoded."""
        which = 0 if kind == "k" else 1
        head, tail = self.head[which], self.tail[which]
        if not self.parts:
            return torch.cat((head, tail), dim=-2) if head.shape[-2] else tail
        assert self.fmt is not None
        compute = torch.promote_types(tail.dtype, torch.float32)
        out = tail.new_empty(self.shape)
        at = head.shape[-2]
        out[..., :at, :] = head
        for part in self.parts:
            vectors = decode_tokens(part[which], self.fmt, kind, compute)
            if kind == "k" and self.key_center is not None:
                vectors += self.key_center[:, None]
            out[..., at : at + vectors.shape[-2], :] = vectors
            at += vectors.shape[-2]
        out[..., at:, :] = tail
        return out
