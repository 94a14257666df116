"""What is measured: shapes of attention, and lists of them."""

from __future__ import annotations

from dataclasses import dataclass

from tq_kernels.format import KVFormat

__all__ = ["BITS", "DECODE", "HEADS", "PREFILL", "QUERIES", "STORE", "SWEEP"]
__all__ += ["Decode", "Prefill", "Store"]


@dataclass(frozen=True)
class Decode:
    """Attention of the last ``query_len`` tokens of ``batch`` sequences of ``context`` tokens."""

    batch: int
    context: int
    k_bits: int = 4
    v_bits: int = 4
    query_len: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def fmt(self) -> KVFormat:
        """Page format."""
        return KVFormat(self.head_dim, self.k_bits, self.v_bits, self.page_size)

    @property
    def pages(self) -> int:
        """Pages a sequence."""
        return -(-self.context // self.page_size)

    def bytes(self, slot_bytes: float) -> int:
        """Bytes moved: the cache once, queries and outputs."""
        rows = self.batch * self.query_len * self.heads * self.head_dim
        return int(self.batch * self.context * self.kv_heads * slot_bytes) + 4 * rows


@dataclass(frozen=True)
class Store:
    """New tokens quantized into the cache."""

    tokens: int
    k_bits: int = 4
    v_bits: int = 4
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def fmt(self) -> KVFormat:
        """Page format."""
        return KVFormat(self.head_dim, self.k_bits, self.v_bits, self.page_size)

    def bytes(self, slot_bytes: float) -> int:
        """Bytes moved: 16-bit keys and values in, codes out."""
        return int(self.tokens * self.kv_heads * (4 * self.head_dim + slot_bytes))


@dataclass(frozen=True)
class Prefill:
    """``tokens`` new tokens of one sequence after ``context`` stored ones."""

    tokens: int
    context: int
    k_bits: int = 4
    v_bits: int = 4
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def fmt(self) -> KVFormat:
        """Page format."""
        return KVFormat(self.head_dim, self.k_bits, self.v_bits, self.page_size)

    @property
    def flops(self) -> int:
        """Operations of both products, causal among the new tokens."""
        pairs = self.tokens * self.context + self.tokens * (self.tokens + 1) // 2
        return 4 * pairs * self.heads * self.head_dim


K = 1024
#: Attention of Llama-3.1-8B, page size 16.
DECODE = (
    Decode(8, 32 * K),
    Decode(1, 32 * K),
    Decode(1, 128 * K),
    Decode(32, 8 * K),
    Decode(64, 4 * K),
    Decode(128, 2 * K),
    Decode(8, 2 * K),
)
BITS = tuple(
    Decode(batch, 32 * K, k_bits, v_bits)
    for k_bits, v_bits in ((4, 3), (3, 3), (2, 2))
    for batch in (8, 1)
)
QUERIES = tuple(Decode(batch, 32 * K, query_len=4) for batch in (8, 1))
HEADS = tuple(
    Decode(8, 8 * K, heads=8 * group, head_dim=head_dim)
    for head_dim, group in ((128, 1), (128, 7), (128, 8), (64, 4), (256, 4))
)
#: Largest first, so that a pool of pages is made once.
SWEEP = tuple(
    Decode(batch, context)
    for batch, context in (
        *((256, c) for c in (8 * K, K, 128)),
        *((64, c) for c in (32 * K, 8 * K, K, 128)),
        *((8, c) for c in (8 * K, K, 128)),
        *((1, c) for c in (8 * K, K, 128)),
    )
)
STORE = (Store(8 * K), Store(64))
PREFILL = (Prefill(2 * K, 30 * K), Prefill(4 * K, 0))
