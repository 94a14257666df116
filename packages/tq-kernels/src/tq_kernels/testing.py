"""Caches with poison, plain attention in float64, and the error that float32 may make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tq_kernels.format import KVFormat
from tq_kernels.ops.dequantize import dequantize_ref
from tq_kernels.ops.store import store_ref

__all__ = ["PagedCache", "attention_f64", "copy_to", "random_cache", "rounding_room"]

#: Two such bytes are an fp16 NaN.
POISON_BYTE = 0x7E
#: A page number that no cache has.
POISON_PAGE = 2**30


@dataclass(frozen=True)
class PagedCache:
    """A compressed cache of some sequences.

    Attributes
    ----------
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
        Every byte that belongs to no stored token is poison; as a scale it is NaN.
    block_table : int32 tensor [batch, max_pages]
        Permuted pages; entries past a sequence are no page at all.
    seq_lens : int32 tensor [batch]
    fmt : KVFormat
    """

    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    fmt: KVFormat

    def slots(self, sequence: int) -> Tensor:
        """Slots of the tokens of one sequence, int64 [length]."""
        length = int(self.seq_lens[sequence])
        at = torch.arange(length, device=self.pages.device)
        page = self.block_table[sequence, at // self.fmt.page_size].to(torch.int64)
        return page * self.fmt.page_size + at % self.fmt.page_size

    def decoded(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence in float64, [length, kv_heads, head_dim]."""
        return dequantize_ref(self.pages, self.slots(sequence), self.fmt, torch.float64)

    def to(self, device: torch.device | str) -> PagedCache:
        """The same on another device."""
        pages, table, lens = (
            self.pages.to(device),
            self.block_table.to(device),
            self.seq_lens.to(device),
        )
        return PagedCache(pages, table, lens, self.fmt)


def random_cache(
    fmt: KVFormat,
    kv_heads: int,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    spare_pages: int = 2,
    key_spread: float = 1.0,
) -> PagedCache:
    """Gaussian keys and values of sequences on permuted pages, poison everywhere else.

    ``key_spread`` multiplies the keys, for sharper attention; scales differ between tokens.
    """
    rng = torch.Generator().manual_seed(seed)
    need = [-(-length // fmt.page_size) for length in lengths]
    total = sum(need) + spare_pages
    pages = fmt.allocate_pages(total, kv_heads).fill_(POISON_BYTE)
    order = torch.randperm(total, generator=rng)
    table = torch.full((len(lengths), max([*need, 1]) + 1), POISON_PAGE, dtype=torch.int32)
    used = 0
    for n, count in enumerate(need):
        table[n, :count] = order[used : used + count].to(torch.int32)
        used += count
    cache = PagedCache(pages, table, torch.tensor(lengths, dtype=torch.int32), fmt)
    for n, length in enumerate(lengths):
        shape = (length, kv_heads, fmt.head_dim)
        size = torch.rand((length, kv_heads, 1), generator=rng) + 0.5
        k = torch.randn(shape, generator=rng) * size * key_spread
        v = torch.randn(shape, generator=rng) * size.flip(0)
        store_ref(k, v, pages, cache.slots(n), fmt)
    return cache


def attention_f64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first_position: int,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    key_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence by its definition, in float64.

    Parameters
    ----------
    q : float tensor [queries, heads, head_dim]
        Query ``i`` has position ``first_position + i`` and sees keys up to it.
    k, v : float tensors [tokens, kv_heads, head_dim]
        Key ``j`` has position ``j``.
    softmax_scale, soft_cap, sliding_window, sinks, key_center
        See `tq_kernels.decode_ref`; the centre is added to all keys.

    Returns
    -------
    out : float64 tensor [queries, heads, head_dim]
    lse : float64 tensor [queries, heads]
    """
    q, k, v = (t.to(torch.float64) for t in (q, k, v))
    if key_center is not None:
        k = k + key_center.to(torch.float64)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    logits = torch.einsum("qhd,khd->qhk", q, k) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    at = torch.arange(first_position, first_position + q.shape[0], device=q.device)[:, None, None]
    keys = torch.arange(k.shape[0], device=q.device)
    hidden = keys > at
    if sliding_window is not None:
        hidden = hidden | (keys <= at - sliding_window)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(torch.float64)[None, :, None].expand(q.shape[0], -1, 1)
        logits = torch.cat((logits, column), dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("qhk,khd->qhd", weights[..., : k.shape[0]], v), lse


def rounding_room(want: Tensor, dtype: torch.dtype, device: torch.device | str) -> float:
    """Error that a kernel may make beyond twice that of eager attention, with weights in float32.

    Four units of float32, of the largest result plus one, for sums in another order. On a GPU as
    many again: ``exp2`` is right to two units there, in weights and in what rescales them. In
    Triton's interpreter a unit of bf16, to which it cuts numbers off where a GPU rounds them.

    Parameters
    ----------
    want : float tensor
        The exact results.
    dtype : torch.dtype
        What the kernel writes.
    device : torch.device or str
        Where it runs; on the CPU that is the interpreter.
    """
    largest = float(want.abs().max())
    on_cpu = torch.device(device).type == "cpu"
    room = (4 if on_cpu else 8) * torch.finfo(torch.float32).eps * (1 + largest)
    if on_cpu and dtype == torch.bfloat16:
        room += torch.finfo(dtype).eps * largest
    return room


def copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device with the strides of ``x``; ``x.to`` closes gaps between numbers."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
