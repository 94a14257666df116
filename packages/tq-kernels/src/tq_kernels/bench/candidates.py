"""What is timed: one class for each kernel, ours here and others where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

import tq_kernels
from tq_kernels.bench.inputs import Pool, normal, queries, random_pages, tables
from tq_kernels.bench.shapes import Decode, Prefill, Store
from tq_kernels.decode_plan import DecodePlan
from tq_kernels.ops.decode import decode_ref
from tq_kernels.ops.dequantize import dequantize_ref
from tq_kernels.ops.store import store, store_ref

if TYPE_CHECKING:
    from tq_kernels.portable.dense import Dense

__all__ = [
    "Call",
    "Candidate",
    "Prepared",
    "TurboQuant",
    "distance",
    "exact",
    "store_inputs",
    "store_pages",
]


Call = Callable[[], object]
#: The way of calling that no CUDA graph captures.
LAUNCHED = "launched"


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN shows."""
    gap = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(gap)


def exact(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """Attention in float32, causal: query ``i`` sees keys up to ``first + i``.

    ``q`` [queries, heads, head_dim], ``k`` and ``v`` [tokens, kv_heads, head_dim].
    """
    group = q.shape[1] // k.shape[1]
    seen = first + torch.arange(q.shape[0], device=q.device)[:, None, None]
    late = torch.arange(k.shape[0], device=q.device) > seen
    found = []
    for head in range(k.shape[1]):
        rows = q[:, head * group : (head + 1) * group].float()
        logits = torch.einsum("qhd,kd->qhk", rows, k[:, head].float()) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(late, -torch.inf).softmax(-1)
        found.append(torch.einsum("qhk,kd->qhd", weights, v[:, head].float()))
    return torch.cat(found, dim=1)


@dataclass
class Prepared:
    """Calls on different buffers; several lists are ways to call, of which the fastest counts.

    ``check`` runs the last call of a way on poisoned outputs and says how far they are from a
    reference.
    """

    ways: dict[str, Sequence[Call]]
    check: Callable[[Call], dict[str, float]]


class Candidate:
    """A kernel under test: bytes that a call moves, and calls on ``copies`` sets of buffers."""

    name: ClassVar[str]
    #: Whether its first call compiles for seconds.
    compiles: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = Pool()

    def bytes(self, shape: Decode | Store | Prefill) -> int:
        """Bytes of device memory that a call has to move."""
        raise NotImplementedError

    def variant(self, shape: Decode | Store | Prefill) -> str:
        """Shapes with equal names compile the same kernels, as far as is known.

        Some may compile anew where the stride of the block table is a multiple of 16.
        """
        values = asdict(shape)
        context = values.pop("context", 0)
        return f"{values} {context // 16 % 16 == 0}"

    def covers(self, shape: Decode | Store | Prefill) -> bool:
        """Whether this kernel can run the shape."""
        return True

    def prepare(self, shape: Decode | Store | Prefill, copies: int) -> Prepared:
        """Make inputs and calls."""
        if isinstance(shape, Decode):
            return self.decode(shape, copies)
        if isinstance(shape, Store):
            return self.store(shape, copies)
        return self.prefill(shape, copies)

    def decode(self, shape: Decode, copies: int) -> Prepared:
        """Calls of decode."""
        raise NotImplementedError

    def store(self, shape: Store, copies: int) -> Prepared:
        """Calls of store."""
        raise NotImplementedError

    def prefill(self, shape: Prefill, copies: int) -> Prepared:
        """Calls of prefill."""
        raise NotImplementedError


class TurboQuant(Candidate):
    """The kernels of tq-kernels."""

    name = "TurboQuant"
    #: Attention on 16-bit keys and values that prefill is given.
    dense: Dense | None = None

    def bytes(self, shape: Decode | Store | Prefill) -> int:
        """See `Candidate`."""
        if isinstance(shape, Prefill):
            new = shape.tokens * shape.head_dim * (4 * shape.heads + 4 * shape.kv_heads)
            return new + shape.context * shape.kv_heads * shape.fmt.slot_bytes
        return shape.bytes(shape.fmt.slot_bytes)

    def _pages(self, shape: Decode | Store | Prefill, count: int) -> Tensor:
        fmt, kv_heads = shape.fmt, shape.kv_heads
        key = (fmt, kv_heads)
        found = self.pool.kept.get(key)
        drawn = found[:256] if found is not None else random_pages(fmt, kv_heads, self.device)
        return self.pool.get(key, drawn, count)

    def decode(self, shape: Decode, copies: int) -> Prepared:
        """See `Candidate`."""
        pages = self._pages(shape, copies * shape.batch * shape.pages)
        block_tables = tables(shape, copies, self.device)
        q, bounds, lengths = queries(shape, self.device)
        out = torch.full_like(q, float("nan"))
        lse = torch.full(q.shape[:2], float("nan"), device=self.device)
        plan = DecodePlan(
            shape.fmt,
            shape.heads,
            shape.kv_heads,
            max_batch=shape.batch,
            max_query_len=shape.query_len,
            dtype=q.dtype,
            device=self.device,
        )
        more = {} if shape.query_len == 1 else {"cu_query_lens": bounds}

        def call(table: Tensor) -> Call:
            return lambda: plan.run(q, pages, table, lengths, out, lse, **more)

        calls = [call(table) for table in block_tables]

        def check(call: Call) -> dict[str, float]:
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            call()
            last = slice(-shape.query_len, None)
            expected, total = decode_ref(
                q[last].float(),
                pages,
                block_tables[-1][-1:],
                lengths[-1:],
                shape.fmt,
                cu_query_lens=bounds[:2],
            )
            gap = float((lse[last] - total).abs().max())
            return {
                "error": distance(out[last], expected),
                "lse_error": gap,
                "finite": float(bool(out.isfinite().all() and lse.isfinite().all())),
            }

        return Prepared({plan.kernels: calls}, check)

    def prefill(self, shape: Prefill, copies: int) -> Prepared:
        """See `Candidate`."""
        q, k, v, block_tables, bounds, stored = prefill_inputs(shape, copies, self.device)
        pages = self._pages(shape, copies * block_tables[0].shape[1])
        fmt, out = shape.fmt, torch.full_like(q, float("nan"))
        lse = torch.full(q.shape[:2], float("nan"), device=self.device)
        plan = tq_kernels.PrefillPlan(
            fmt, shape.heads, shape.kv_heads, 1, shape.tokens, q.dtype, self.device,
            dense=self.dense,
        )  # fmt: skip
        lengths, contexts = [shape.tokens], [shape.context]

        def call(table: Tensor) -> Call:
            return lambda: plan.run(
                q, k, v, pages, table, bounds, stored, out, lse,
                query_lens_host=lengths, context_lens_host=contexts,
            )  # fmt: skip

        def check(call: Call) -> dict[str, float]:
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            call()
            at = torch.arange(shape.context, device=self.device)
            page = block_tables[-1][0].long()[at // shape.page_size]
            slots = page * shape.page_size + at % shape.page_size
            prefix = dequantize_ref(pages, slots, fmt, torch.float32)
            keys, values = (
                torch.cat((old, new.float())) for old, new in zip(prefix, (k, v), strict=True)
            )
            few = min(64, shape.tokens)
            first = shape.context + shape.tokens - few
            return {
                "error": distance(out[-few:], exact(q[-few:], keys, values, first)),
                "finite": float(bool(out.isfinite().all() and lse.isfinite().all())),
            }

        calls = [call(table) for table in block_tables]
        return Prepared({LAUNCHED: calls, "in a graph": calls}, check)

    def store(self, shape: Store, copies: int) -> Prepared:
        """See `Candidate`."""
        pages = self._pages(shape, copies * store_pages(shape))
        inputs, slots = store_inputs(shape, copies, self.device)
        fmt = shape.fmt

        def call(kv: Tensor, where: Tensor) -> Call:
            return lambda: store(kv[0], kv[1], pages, where, fmt)

        def check(_: Call) -> dict[str, float]:
            few = min(shape.tokens, 512)
            kv, where = inputs[0][:, :few], torch.arange(few, device=self.device)
            size = -(-few // shape.page_size)
            ours, reference = (torch.zeros_like(pages[:size]) for _ in range(2))
            store(kv[0], kv[1], ours, where, fmt)
            store_ref(kv[0], kv[1], reference, where, fmt)
            decoded, expected = (
                torch.stack(dequantize_ref(which, where, fmt, torch.float32))
                for which in (ours, reference)
            )
            return {
                "error": distance(decoded, expected),
                "bytes_that_differ": float((ours != reference).float().mean()),
            }

        return Prepared({"": [call(*pair) for pair in zip(inputs, slots, strict=True)]}, check)


def prefill_inputs(
    shape: Prefill, copies: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Queries, keys and values bf16; block tables of the stored tokens; bounds; stored tokens."""
    q, k, v = (
        normal((heads, shape.tokens, shape.head_dim), device, torch.bfloat16).transpose(0, 1)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    like = Decode(1, max(shape.context, 1), page_size=shape.page_size)
    bounds = torch.tensor([0, shape.tokens], dtype=torch.int32, device=device)
    stored = torch.tensor([shape.context], dtype=torch.int32, device=device)
    return (
        q.contiguous(),
        k.contiguous(),
        v.flip(0).contiguous(),
        tables(like, copies, device),
        bounds,
        stored,
    )


def store_pages(shape: Store) -> int:
    """Pages that a call writes to: whole ones for a prompt, one a token for decode steps."""
    return shape.tokens if shape.tokens < 1024 else -(-shape.tokens // shape.page_size)


def store_inputs(
    shape: Store, copies: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values bf16 [2, tokens, kv_heads, head_dim] and slots of every copy.

    Pages are permuted. Few tokens are those of a decode step, each in a page of its own.
    """
    drawn = normal((2, shape.tokens, shape.kv_heads, shape.head_dim), device, torch.bfloat16)
    inputs = [drawn.roll(n, 1) for n in range(copies)]
    count, size = store_pages(shape), shape.page_size
    token = torch.arange(shape.tokens, device=device)
    place, offset = (token, token * 7) if shape.tokens < 1024 else (token // size, token)
    order = torch.randperm(count, device=device)
    slots = [(order[place] + n * count) * size + offset % size for n in range(copies)]
    return inputs, slots
