"""Prefill with the portable kernels: new keys and values in 16 bits, after a compressed prefix.

New tokens attend each other by the best dense attention there is. The prefix of a sequence with
few new tokens is read as codes; that of a long chunk is expanded piece by piece, in the rotated
space, into a fixed scratch of fp16 keys and values, which dense attention reads many times. Results
are merged by their LSEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.aot import Variant
from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.checks import check_cumulative, check_tensor
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import portable_kernels
from tq_kernels.portable.decode import PortableDecodePlan
from tq_kernels.portable.dense import (
    Dense,
    attend_triton,
    choose_dense,
    dense_constants,
    dense_kernel,
    dense_shape,
)
from tq_kernels.portable.expand_pages import (
    expand_constants,
    expand_kernel,
    expand_pages,
    key_order,
)
from tq_kernels.portable.merge import merge_constants, merge_kernel, merge_rows
from tq_kernels.portable.rotate import LARGE_ROTATION, rotate
from tq_kernels.portable.unpack import value_order

__all__ = ["PrefillPlan"]


class PrefillPlan:
    """Attention of new tokens on each other and on a compressed prefix.

    ``run`` takes the lengths on the host as well, since they decide which kernels run; without
    them it waits for the device. A CUDA graph of it holds for these lengths. Results between the
    kernels come from PyTorch's allocator.

    Parameters
    ----------
    fmt, heads, kv_heads, max_batch, dtype, device
        See `tq_kernels.attention_spec.AttentionSpec`.
    max_tokens : int
        Most new tokens of a run, all sequences together.
    softmax_scale, soft_cap, sliding_window
        See `tq_kernels.attention_spec.AttentionSpec`.
    codes_query_len : int
        Sequences of at most this many new tokens read their prefix as codes.
    scratch_tokens : int
        Tokens of the prefix that are expanded at once, a multiple of 4; ``4 * kv_heads * head_dim``
        bytes each (twice that for float32).
    dense : Dense, optional
        Attention without soft cap and window, such as a wrapper of a newer FlashAttention. Not
        given: PyTorch's flash attention where it runs, else a Triton kernel.

    Raises
    ------
    TQError
        For values outside of these, and for a device that Triton cannot use.
    """

    def __init__(
        self,
        fmt: KVFormat,
        heads: int,
        kv_heads: int,
        max_batch: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        softmax_scale: float | None = None,
        soft_cap: float | None = None,
        sliding_window: int | None = None,
        codes_query_len: int = 16,
        scratch_tokens: int = 16384,
        dense: Dense | None = None,
    ) -> None:
        self.spec = spec = AttentionSpec(
            fmt,
            heads,
            kv_heads,
            max_batch,
            max_tokens,
            dtype,
            torch.device(device),
            softmax_scale,
            soft_cap,
            sliding_window,
        )
        portable_kernels("prefill", spec.device)  # raises where Triton cannot run
        if codes_query_len < 0:
            raise TQError(f"codes_query_len={codes_query_len}: needs 0 or more")
        if scratch_tokens < 4 or scratch_tokens % 4:
            raise TQError(f"scratch_tokens={scratch_tokens}: needs a positive multiple of 4")
        plain = soft_cap is None and sliding_window is None
        if dense is None:
            dense = choose_dense(spec.device, dtype)
        self._dense = dense if plain else None
        self._codes_query_len = codes_query_len
        self._codes = None
        if codes_query_len:
            few = replace(spec, max_query_len=min(codes_query_len, max_tokens))
            self._codes = PortableDecodePlan(few, prefix=True)
        shape = (2, scratch_tokens, kv_heads, fmt.head_dim)
        # fp16 holds what is expanded more precisely than bf16.
        self._wide = torch.float32 if dtype == torch.float32 else torch.float16
        self._scratch = torch.empty(shape, dtype=self._wide, device=spec.device)
        self._key_order, self._value_order = tuple(key_order(fmt)), tuple(value_order(fmt))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        block_table: Tensor,
        cu_query_lens: Tensor,
        context_lens: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        query_lens_host: Sequence[int] | None = None,
        context_lens_host: Sequence[int] | None = None,
        sinks: Tensor | None = None,
        key_center: Tensor | None = None,
    ) -> None:
        """Attention into ``out`` and ``lse``; see `tq_kernels.prefill_ref`.

        Parameters
        ----------
        q, out : tensors [tokens, heads, head_dim] of the plan's dtype
        k, v : tensors [tokens, kv_heads, head_dim] of the plan's dtype
        pages : uint8 tensor [num_pages, kv_heads, record_bytes]
        block_table : int32 tensor [batch, max_pages]
        cu_query_lens : int32 tensor [batch + 1]
        context_lens : int32 tensor [batch]
        lse : float32 tensor [tokens, heads]
        query_lens_host, context_lens_host : sequences of int, optional
            New tokens and stored tokens of each sequence.
        sinks : float tensor [heads], optional
        key_center : float tensor [kv_heads, head_dim], optional

        Raises
        ------
        TQError
            For shapes, dtypes, strides, devices or lengths that do not fit the plan.
        """
        spec = self.spec
        spec.check_run(
            q,
            pages,
            block_table,
            context_lens,
            out,
            lse,
            cu_query_lens=cu_query_lens,
            sinks=sinks,
            key_center=key_center,
        )
        tokens = q.shape[0]
        if tokens > spec.max_query_len:
            raise TQError(
                f"q has {tokens} tokens: the plan was made for {spec.max_query_len}; make a "
                "larger plan"
            )
        for name, tensor in (("k", k), ("v", v)):
            shape = (tokens, spec.kv_heads, spec.fmt.head_dim)
            check_tensor(name, tensor, shape, (spec.dtype,), spec.device)
            if tensor.numel() and tensor.stride(-1) != 1:
                raise TQError(
                    f"{name} has stride {tensor.stride(-1)} in the last dimension: needs 1; call "
                    ".contiguous()"
                )
        counts, contexts = self._lengths(
            tokens, cu_query_lens, context_lens, query_lens_host, context_lens_host
        )
        if tokens == 0:
            return
        stored = any(count and context for count, context in zip(counts, contexts, strict=True))
        alone = not stored and sinks is None
        new_out, new_lse = self._new_tokens(q, k, v, cu_query_lens, counts, out if alone else None)
        if alone:
            if new_out is not out:
                out.copy_(new_out)
            lse.copy_(new_lse)
            return
        old_out = torch.empty(q.shape, dtype=torch.float32, device=spec.device)
        old_lse = torch.empty((tokens, spec.heads), device=spec.device)
        if self._codes is not None and max(counts) <= self._codes_query_len:
            self._codes.run_unchecked(
                q, pages, block_table, context_lens, old_out, old_lse,
                cu_query_lens=cu_query_lens, key_center=key_center,
            )  # fmt: skip
        else:
            self._one_by_one(q, pages, block_table, context_lens, counts, contexts, key_center,
                             old_out, old_lse)  # fmt: skip
        merge_rows(old_out, old_lse, new_out, new_lse, out, lse, sinks)

    def _one_by_one(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        counts: list[int],
        contexts: list[int],
        key_center: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Attention on the prefixes where some sequences have many new tokens, others few."""
        stored = [n for n, count in enumerate(counts) if count and contexts[n]]
        if sum(counts[n] for n in stored) < q.shape[0]:
            out.zero_()
            lse.fill_(-torch.inf)
        starts = [0, *accumulate(counts)]
        few = [n for n in stored if self._codes is not None and counts[n] <= self._codes_query_len]
        if few:
            self._read_codes(few, starts, counts, q, pages, block_table, context_lens, key_center,
                             out, lse)  # fmt: skip
        for n in stored:
            if n not in few:
                rows = slice(starts[n], starts[n + 1])
                self._expand(q[rows], pages, block_table[n], contexts[n], key_center,
                             out[rows], lse[rows])  # fmt: skip

    def warm_up(self, *, sinks: Tensor | None = None, key_center: Tensor | None = None) -> None:
        """Compile what runs of any lengths need, by small runs; see `DecodePlan.warm_up`."""
        spec, fmt, device = self.spec, self.spec.fmt, self.spec.device
        pages = torch.zeros(1, spec.kv_heads, fmt.record_bytes, dtype=torch.uint8, device=device)
        pieces = 2 * self._scratch.shape[1] + 1  # the third is merged into what two gave
        table = torch.zeros(
            1, -(-pieces // fmt.page_size), dtype=torch.int32, device=device
        )  # a single page over and over
        # Dense attention has another kernel for more than 16 queries.
        few, many = 1, min(max(17, self._codes_query_len + 1), spec.max_query_len)
        large = min(-(-LARGE_ROTATION // spec.heads), spec.max_query_len)
        cases = ((few, 0), (many, 0), (few, 1), (many, 1), (many, pieces), (large, 1))
        for count, context in cases:
            q = torch.zeros(count, spec.heads, fmt.head_dim, dtype=spec.dtype, device=device)
            k = torch.zeros(count, spec.kv_heads, fmt.head_dim, dtype=spec.dtype, device=device)
            self.run(
                q,
                k,
                k,
                pages,
                table,
                torch.tensor([0, count], dtype=torch.int32, device=device),
                torch.tensor([context], dtype=torch.int32, device=device),
                torch.empty_like(q),
                torch.empty(count, spec.heads, device=device),
                query_lens_host=[count],
                context_lens_host=[context],
                sinks=sinks,
                key_center=key_center,
            )

    def _lengths(
        self,
        tokens: int,
        cu_query_lens: Tensor,
        context_lens: Tensor,
        query_lens_host: Sequence[int] | None,
        context_lens_host: Sequence[int] | None,
    ) -> tuple[list[int], list[int]]:
        """New and stored tokens of each sequence on the host."""
        if query_lens_host is None:
            check_cumulative("cu_query_lens", cu_query_lens, tokens)
            query_lens_host = cu_query_lens.diff().tolist()
        if context_lens_host is None:
            context_lens_host = context_lens.tolist()
        counts, contexts = list(query_lens_host), list(context_lens_host)
        batch = context_lens.shape[0]
        if len(counts) != batch or len(contexts) != batch or sum(counts) != tokens:
            raise TQError(
                f"query_lens_host has {len(counts)} lengths of sum {sum(counts)}, "
                f"context_lens_host {len(contexts)}: needs {batch} sequences of {tokens} tokens; "
                "pass the lengths of this batch"
            )
        return counts, contexts

    def _new_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, counts: list[int], out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the new tokens on each other, in ``out`` if given and possible."""
        spec, longest = self.spec, max(counts)
        if self._dense is not None:
            return self._dense(
                q, k, v, cu, cu, longest, longest,
                causal=True, softmax_scale=spec.scale, out=out,
            )  # fmt: skip
        return attend_triton(
            q,
            k,
            v,
            cu,
            cu,
            longest,
            torch.zeros(len(counts), dtype=torch.int32, device=spec.device),
            causal=True,
            softmax_scale=spec.scale,
            soft_cap=spec.soft_cap,
            sliding_window=spec.sliding_window,
        )

    def _read_codes(
        self,
        sequences: list[int],
        starts: list[int],
        counts: list[int],
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        key_center: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Attention of some sequences on their prefixes as codes, into their rows."""
        assert self._codes is not None
        device = self.spec.device
        # Made on the device: a copy from the host could not be captured in a graph.
        chosen = torch.cat([torch.full((1,), n, device=device) for n in sequences])
        rows = torch.cat([torch.arange(starts[n], starts[n + 1], device=device) for n in sequences])
        ends = accumulate(counts[n] for n in sequences)
        cu = torch.cat(
            [torch.full((1,), end, dtype=torch.int32, device=device) for end in (0, *ends)]
        )
        shape = (len(rows), self.spec.heads)
        some_out = torch.empty((*shape, self.spec.fmt.head_dim), device=device)
        some_lse = torch.empty(shape, device=device)
        self._codes.run_unchecked(
            q[rows],
            pages,
            block_table[chosen],
            context_lens[chosen],
            some_out,
            some_lse,
            cu_query_lens=cu,
            key_center=key_center,
        )
        out[rows], lse[rows] = some_out, some_lse

    def _expand(
        self,
        q: Tensor,
        pages: Tensor,
        table: Tensor,
        context: int,
        key_center: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Attention of one sequence on its prefix, expanded piece by piece, into its rows."""
        spec, device = self.spec, self.spec.device
        tokens = q.shape[0]
        rotated = torch.empty(q.shape, dtype=self._wide, device=device)
        rotate(q.flatten(0, 1), rotated.flatten(0, 1), spec.fmt, order=self._key_order)
        bias = None
        if key_center is not None:
            centers = key_center.float().repeat_interleave(spec.group, dim=0)
            bias = (q.float() * centers).sum(dim=-1) * spec.scale
        scratch_k, scratch_v = self._scratch.unbind()
        cu_q = _zero_and(tokens, device)
        state: tuple[Tensor, Tensor] | None = None
        start = 0
        if spec.sliding_window is not None:
            start = max(context - spec.sliding_window + 1, 0) // 4 * 4
        while start < context:
            count = min(len(scratch_k), context - start)
            keys, values = scratch_k[:count], scratch_v[:count]
            expand_pages(pages, table, start, keys, values, spec.fmt)
            cu_k = _zero_and(count, device)
            if self._dense is not None:
                part, part_lse = self._dense(
                    rotated, keys, values, cu_q, cu_k, tokens, count,
                    causal=False, softmax_scale=spec.scale,
                )  # fmt: skip
            else:
                part, part_lse = attend_triton(
                    rotated, keys, values, cu_q, cu_k, tokens,
                    torch.full((1,), context - start, dtype=torch.int32, device=device),
                    causal=False, softmax_scale=spec.scale, soft_cap=spec.soft_cap,
                    sliding_window=spec.sliding_window, bias=bias if spec.soft_cap is not None else None,
                    out_dtype=torch.float32,
                )  # fmt: skip
            if state is None:
                state = part, part_lse
            else:
                merge_rows(*state, part, part_lse, out, lse)
                state = out, lse
            start += count
        assert state is not None
        if state[1] is not lse:
            lse.copy_(state[1])
        if bias is not None and spec.soft_cap is None:
            lse += bias
        rotate(
            state[0].flatten(0, 1), out.flatten(0, 1), spec.fmt,
            inverse=True, order=self._value_order,
        )  # fmt: skip


def _zero_and(count: int, device: torch.device) -> Tensor:
    """``[0, count]``, made on the device."""
    return torch.arange(0, 2 * count, count, dtype=torch.int32, device=device)


def aot_variants() -> list[Variant]:
    """Variants of the kernels of prefill over head_dim, dtype and options."""
    found = []
    strides = [f"{x}_{y}_stride" for x in "qkv" for y in ("token", "head")]
    for dim, dtype, longest, options, quick in (
        (64, "bf16", 2048, False, False),
        (128, "bf16", 2048, False, True),
        (128, "fp16", 1, True, False),
        (80, "fp16", 2048, True, False),
        (192, "bf16", 2048, True, False),
        (256, "bf16", 2048, False, False),
        (128, "fp32", 2048, True, False),
    ):
        torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        shape = dense_shape(dim, torch_dtype, longest)
        found.append(
            Variant(
                name=f"dense-d{dim}-{dtype}-rows{shape['ROWS']}" + "-all" * options,
                kernel=dense_kernel,
                signature={
                    **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"),
                    **dict.fromkeys(("cu_q", "cu_k", "offsets"), "*i32"),
                    **dict.fromkeys(("bias", "lse"), "*fp32"),
                    **dict.fromkeys(("logit_scale", "soft_cap"), "fp32"),
                    **dict.fromkeys(("window", "group", "kv_heads", *strides), "i32"),
                },
                constexprs=dense_constants(
                    dim, torch_dtype, shape, causal=True, window=options, cap=options, bias=options
                ),
                num_warps=shape["WARPS"],
                num_stages=2,
                # sm_100: ptxas keeps to 128 registers, for two programs of 8 warps at a time.
                spills=16,
                aligned=tuple(strides),
                quick=quick,
            )
        )
    for dim, k_bits, v_bits, quick in (
        (128, 4, 4, True), (80, 3, 3, False), (256, 8, 2, False), (128, 3, 8, False),
    ):  # fmt: skip
        found.append(
            Variant(
                name=f"expand-d{dim}-k{k_bits}v{v_bits}",
                kernel=expand_kernel,
                signature={
                    "pages": "*u8", "table": "*i32", "k": "*fp16", "v": "*fp16",
                    **dict.fromkeys(("start", "tokens", "kv_heads"), "i32"),
                    **dict.fromkeys(("page_stride", "record_stride"), "i32"),
                    **dict.fromkeys(("k_step", "v_step"), "fp32"),
                },
                constexprs=expand_constants(KVFormat(dim, k_bits, v_bits)),
                num_warps=2,
                aligned=("page_stride", "record_stride"),
                quick=quick,
            )
        )  # fmt: skip
    merge_strides = [n for n in merge_kernel.arg_names if n.endswith(("stride", "stride2"))]
    for dim in (128, 192):
        found.append(
            Variant(
                name=f"merge-d{dim}",
                kernel=merge_kernel,
                signature={
                    "out": "*fp32", "out2": "*bf16", "target": "*bf16",
                    **dict.fromkeys(("lse", "lse2", "target_lse", "sinks"), "*fp32"),
                    **dict.fromkeys(("rows_total", "heads", *merge_strides), "i32"),
                },
                constexprs=merge_constants(dim, sinks=True),
                num_warps=4,
                aligned=tuple(n for n in merge_strides if not n.startswith(("lse", "target_lse"))),
                quick=dim == 128,
            )
        )  # fmt: skip
    return found
