"""What the kernels are compared with: FlashAttention 3 and vLLM's Triton kernels.

They come from a folder that ``stage_peers.py`` wrote; its path is in the environment variable
``TQ_BENCH_PEERS`` so that processes that compile ahead find it too. Caches are laid out as vLLM
lays them out, [pages, tokens, heads, contents].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tq_kernels.bench.candidates import (
    Call,
    Candidate,
    Prepared,
    TurboQuant,
    distance,
    exact,
    store_inputs,
    store_pages,
)
from tq_kernels.bench.inputs import DRAWN, normal, queries, tables
from tq_kernels.bench.shapes import Decode, Prefill, Store

PEERS = "TQ_BENCH_PEERS"


def folder() -> Path:
    """The staged folder, importable."""
    path = Path(os.environ[PEERS]).resolve()
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return path


def gathered(cache: Tensor, table: Tensor, tokens: int) -> Tensor:
    """Contents of one sequence, [tokens, kv_heads, contents]."""
    return cache[table.long()].flatten(0, 1)[:tokens]


class Fa3(Candidate):
    """FlashAttention 3 on a paged cache of bf16."""

    name = "FlashAttention 3 bf16"
    compiles = False
    dtype = torch.bfloat16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        torch.ops.load_library(str(folder() / "fa3.so"))

    def covers(self, shape: Any) -> bool:
        return not isinstance(shape, Store)

    def bytes(self, shape: Any) -> int:
        size = 2 * shape.head_dim * self.dtype.itemsize
        if isinstance(shape, Prefill):
            new = shape.tokens * shape.head_dim * (4 * shape.heads + 4 * shape.kv_heads)
            return new + shape.context * shape.kv_heads * size
        return shape.bytes(size)

    def _cache(self, shape: Any, count: int) -> Tensor:
        """[pages, tokens, kv_heads, 2 * head_dim], keys then values."""
        size = (DRAWN // shape.page_size, shape.page_size, shape.kv_heads, 2 * shape.head_dim)
        key = (*size, self.dtype)
        found = self.pool.kept.get(key)
        drawn = normal(size, self.device, self.dtype) if found is None else found[: size[0]]
        return self.pool.get(key, drawn, count)

    def _ways(self, shape: Any, query_len: int, context: int, batch: int, lengths: Tensor,
              bounds: Tensor) -> dict[str, tuple[Tensor | None, int]]:  # fmt: skip
        """Schedule made inside of the call or ahead, splits chosen by it or at most 32 of them."""

        def schedule(splits: int) -> Tensor:
            metadata: Tensor = torch.ops._vllm_fa3_C.get_scheduler_metadata(
                batch, query_len, context, shape.heads, shape.kv_heads, shape.head_dim,
                shape.head_dim, self.dtype, lengths, bounds, None, None, None, None,
                shape.page_size, 0, True, -1, -1, False, splits, None, 0,
            )  # fmt: skip
            return metadata

        ways: dict[str, tuple[Tensor | None, int]] = {"schedule inside": (None, 0)}
        for name, splits in (("schedule ahead", 0), ("schedule ahead, at most 32 splits", 32)):
            try:
                ways[name] = (schedule(splits), splits)
            except RuntimeError as error:
                print(f"{self.name}: {name}: {error}", file=sys.stderr)
        return ways

    def _call(self, q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, bounds: Tensor,
              out: Tensor, query_len: int, context: int, way: tuple[Tensor | None, int],
              scales: Tensor | None) -> Call:  # fmt: skip
        k, v = cache.split(cache.shape[-1] // 2, dim=-1)
        metadata, splits = way
        return lambda: torch.ops._vllm_fa3_C.fwd(
            q, k, v, None, None, None, out, bounds, None, None, None, lengths, query_len,
            context, table, None, None, None, None, None, scales, scales, scales,
            q.shape[-1] ** -0.5, True, -1, -1, 0.0, True, metadata, splits, None, 0, None,
            1, 0, None,
        )  # fmt: skip

    def decode(self, shape: Decode, copies: int) -> Prepared:
        cache = self._cache(shape, copies * shape.batch * shape.pages)
        block_tables = tables(shape, copies, self.device)
        q, bounds, lengths = queries(shape, self.device)
        out = torch.full_like(q, float("nan"))
        asked = q.to(self.dtype)
        scales = None
        if self.dtype.itemsize == 1:
            one = torch.ones(1, device=self.device)
            scales = one.expand(shape.batch, shape.kv_heads)
        ways = self._ways(shape, shape.query_len, shape.context, shape.batch, lengths, bounds)
        calls = {
            name: [
                self._call(asked, cache, table, lengths, bounds, out, shape.query_len,
                           shape.context, way, scales)
                for table in block_tables
            ]
            for name, way in ways.items()
        }  # fmt: skip

        def check(call: Call) -> dict[str, float]:
            out.fill_(float("nan"))
            call()
            last = slice(-shape.query_len, None)
            kv = gathered(cache, block_tables[-1][-1], shape.context)
            k, v = kv.split(shape.head_dim, dim=-1)
            expected = exact(asked[last], k, v, shape.context - shape.query_len)
            return {"error": distance(out[last], expected)}

        return Prepared(calls, check)

    def prefill(self, shape: Prefill, copies: int) -> Prepared:
        total = shape.tokens + shape.context
        like = Decode(1, total, heads=shape.heads, kv_heads=shape.kv_heads,
                      head_dim=shape.head_dim, page_size=shape.page_size)  # fmt: skip
        cache = self._cache(shape, copies * like.pages)
        block_tables = tables(like, copies, self.device)
        q = normal((shape.tokens, shape.heads, shape.head_dim), self.device, self.dtype)
        out = torch.full_like(q, float("nan"))
        bounds = torch.tensor([0, shape.tokens], dtype=torch.int32, device=self.device)
        lengths = torch.tensor([total], dtype=torch.int32, device=self.device)
        ways = self._ways(shape, shape.tokens, total, 1, lengths, bounds)
        calls = {
            name: [
                self._call(q, cache, table, lengths, bounds, out, shape.tokens, total, way, None)
                for table in block_tables
            ]
            for name, way in list(ways.items())[:2]
        }

        def check(call: Call) -> dict[str, float]:
            out.fill_(float("nan"))
            call()
            last = slice(-64, None)
            kv = gathered(cache, block_tables[-1][-1], total)
            k, v = kv.split(shape.head_dim, dim=-1)
            return {"error": distance(out[last], exact(q[last], k, v, total - 64))}

        return Prepared(calls, check)


class OnFa3(TurboQuant):
    """Prefill of ours that leaves its 16-bit attention to FlashAttention 3, as in vLLM."""

    name = "TurboQuant on FlashAttention 3"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        torch.ops.load_library(str(folder() / "fa3.so"))

    def covers(self, shape: Any) -> bool:
        return isinstance(shape, Prefill)

    @staticmethod
    def dense(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        causal: bool, softmax_scale: float, out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `tq_kernels.portable.dense.Dense`."""
        result, lse, *_ = torch.ops._vllm_fa3_C.fwd(
            q, k, v, None, None, None, out, cu_q, cu_k, None, None, None, max_q, max_k, None,
            None, None, None, None, None, None, None, None, softmax_scale, causal, -1, -1, 0.0,
            True, None, 0, None, 0, None, 1, 0, None,
        )  # fmt: skip
        return result, lse.transpose(0, 1)


class Fa3Fp8(Fa3):
    """FlashAttention 3 on a paged cache of fp8, queries in fp8 too, as vLLM runs it."""

    name = "FlashAttention 3 fp8"
    dtype = torch.float8_e4m3fn

    def covers(self, shape: Any) -> bool:
        return isinstance(shape, Decode) and shape.query_len == 1


class Quantized(Candidate):
    """A quantized cache of vLLM: filled by its own kernel with normal keys and values."""

    #: Bytes a token and head.
    slot: int

    def covers(self, shape: Any) -> bool:
        return (
            not isinstance(shape, Prefill)
            and shape.head_dim == 128
            and (isinstance(shape, Store) or shape.query_len == 1)
        )

    def variant(self, shape: Any) -> str:
        batch = getattr(shape, "batch", 0)
        return f"{batch == 1} {batch > 16}"

    def bytes(self, shape: Any) -> int:
        return shape.bytes(self.slot)  # type: ignore[no-any-return]

    def fill(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Quantize ``k`` and ``v`` into the cache [pages, tokens, kv_heads, slot bytes]."""
        raise NotImplementedError

    def attend(self, shape: Decode, q: Tensor, cache: Tensor, lengths: Tensor, bounds: Tensor,
               out: Tensor) -> Callable[[Tensor], Call]:  # fmt: skip
        """Function from a block table to a call that writes ``out``."""
        raise NotImplementedError

    def _drawn(self, shape: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and a cache of ``DRAWN`` tokens."""
        size = (DRAWN, shape.kv_heads, shape.head_dim)
        k, v = normal((2, *size), self.device, torch.bfloat16)
        count = DRAWN // shape.page_size
        cache = torch.zeros(
            count, shape.page_size, shape.kv_heads, self.slot, dtype=torch.uint8,
            device=self.device,
        )  # fmt: skip
        self.fill(k, v, cache, torch.arange(DRAWN, device=self.device))
        return k, v, cache

    def decode(self, shape: Decode, copies: int) -> Prepared:
        k, v, drawn = self._drawn(shape)
        cache = self.pool.get(shape.page_size, drawn, copies * shape.batch * shape.pages)
        block_tables = tables(shape, copies, self.device)
        q, bounds, lengths = queries(shape, self.device)
        out = torch.full_like(q, float("nan"))
        call = self.attend(shape, q, cache, lengths, bounds, out)
        calls = [call(table) for table in block_tables]

        def check(call: Call) -> dict[str, float]:
            out.fill_(float("nan"))
            call()
            pages = block_tables[-1][-1].long() % drawn.shape[0]
            where = (pages[:, None] * shape.page_size
                     + torch.arange(shape.page_size, device=self.device)).flatten()  # fmt: skip
            where = where[: shape.context]
            expected = exact(q[-1:], k[where], v[where], shape.context - 1)
            return {"error_with_quantization": distance(out[-1:], expected)}

        return Prepared({"": calls}, check)

    def store(self, shape: Store, copies: int) -> Prepared:
        _, _, drawn = self._drawn(shape)
        cache = self.pool.get(shape.page_size, drawn, copies * store_pages(shape))
        inputs, slots = store_inputs(shape, copies, self.device)

        def call(kv: Tensor, where: Tensor) -> Call:
            return lambda: self.fill(kv[0], kv[1], cache, where)

        calls = [call(*pair) for pair in zip(inputs, slots, strict=True)]
        return Prepared({"": calls}, lambda _: {})


class BuiltIn(Quantized):
    """vLLM's ``--kv-cache-dtype turboquant_4bit_nc``."""

    name = "vLLM turboquant_4bit_nc"
    slot = 134
    splits = 32

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        folder()
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.v1.attention.ops.triton_turboquant_decode import (
            triton_turboquant_decode_attention,
        )
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        self._decode, self._store = triton_turboquant_decode_attention, triton_turboquant_store
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < 128:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        self.matrix = (matrix / 128**0.5).to(device)
        self.centroids = get_centroids(128, 4).to(device)
        self.midpoints = (self.centroids[:-1] + self.centroids[1:]) / 2

    def fill(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._store(k, v, cache, slots, self.matrix, self.midpoints, 4, 66, 4)

    def attend(self, shape: Decode, q: Tensor, cache: Tensor, lengths: Tensor, bounds: Tensor,
               out: Tensor) -> Callable[[Tensor], Call]:  # fmt: skip
        size = (shape.batch, shape.heads, self.splits, shape.head_dim + 1)
        partial = torch.empty(size, device=self.device)
        lse = torch.empty(shape.batch, shape.heads, device=self.device)

        def call(table: Tensor) -> Call:
            return lambda: self._decode(
                q, cache, table, lengths, self.matrix, self.centroids, shape.head_dim**-0.5,
                4, 66, 4, norm_correction=True, PiT=self.matrix, mid_o_buf=partial,
                output_buf=out, lse_buf=lse, max_num_kv_splits=self.splits,
            )  # fmt: skip

        return call


class Int4(Quantized):
    """vLLM's ``--kv-cache-dtype int4_per_token_head``, its rotation by its Triton kernel."""

    name = "vLLM int4_per_token_head"
    slot = 136
    segments = 16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        folder()
        from vllm.v1.attention.ops import int4_per_token_head

        self.module = int4_per_token_head

    def _parts(self, cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values [.., 68] and their float32 scales behind them."""
        half = self.slot // 2
        scales = cache.view(torch.float32)
        return (
            cache[..., :half],
            cache[..., half:],
            scales[..., half // 4 - 1],
            scales[..., 2 * (half // 4) - 1],
        )

    def fill(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        keys, values, k_scales, v_scales = self._parts(cache)
        self.module.reshape_and_cache_int4(
            k, v, keys, values, slots, k_scale_cache=k_scales, v_scale_cache=v_scales
        )

    def attend(self, shape: Decode, q: Tensor, cache: Tensor, lengths: Tensor, bounds: Tensor,
               out: Tensor) -> Callable[[Tensor], Call]:  # fmt: skip
        keys, values, k_scales, v_scales = self._parts(cache)
        threshold = 128 // shape.kv_heads
        size = (threshold, shape.heads, self.segments)
        partial = torch.empty(*size, shape.head_dim, device=self.device)
        largest, total = (
            torch.empty(size, device=self.device),
            torch.empty(size, device=self.device),
        )

        def call(table: Tensor) -> Call:
            return lambda: self.module.unified_attention_int4(
                q, keys, values, out, cu_seqlens_q=bounds, max_seqlen_q=1, seqused_k=lengths,
                max_seqlen_k=shape.context, softmax_scale=shape.head_dim**-0.5,
                window_size=(-1, -1), block_table=table, softcap=0.0, sinks=None,
                alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
                mm_prefix_range=None, k_scale_cache=k_scales, v_scale_cache=v_scales,
                seq_threshold_3D=threshold, num_par_softmax_segments=self.segments,
                softmax_segm_output=partial, softmax_segm_max=largest, softmax_segm_expsum=total,
            )  # fmt: skip

        return call


ALL: tuple[type[Candidate], ...] = (Fa3, Fa3Fp8, BuiltIn, Int4, OnFa3)
