"""What a step's batch looks like, the same for all layers of a group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from tq_core import TQError
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from tq_vllm.report import report_cache, warn_of_padding

__all__ = ["TurboQuantMetadata", "TurboQuantMetadataBuilder", "batch_limits"]


def batch_limits(vllm_config: Any) -> tuple[int, int, int]:
    """Most sequences of a step, new tokens of one that counts as decoding, and tokens in all."""
    speculation = vllm_config.speculative_config
    drafts = getattr(speculation, "num_speculative_tokens", None) or 0
    if getattr(speculation, "parallel_drafting", False):
        drafts *= 2
    sequences = vllm_config.scheduler_config.max_num_seqs
    captured = getattr(vllm_config.compilation_config, "max_cudagraph_capture_size", 0) or 0
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    return max(sequences, -(-captured // (1 + drafts))), 1 + drafts, max(tokens, captured)


@dataclass
class TurboQuantMetadata(AttentionMetadata):
    """A batch: first the decodes, sequences with few new tokens, then the prefills.

    What only prefills need is None in a batch without them.

    Attributes
    ----------
    block_table : int32 tensor [requests, max_pages]
    seq_lens : int32 tensor [requests]
        Tokens of each sequence, new ones included.
    query_start_loc : int32 tensor [requests + 1]
        Where the new tokens of each sequence start.
    slot_mapping : int64 tensor [tokens]
    num_tokens, num_decodes, num_decode_tokens, num_prefills : int
    max_decode_query_len : int
        Most new tokens of a decode, or an upper bound of it.
    prefill_start_loc : int32 tensor [prefills + 1], optional
        Where the new tokens of each prefill start, counted from the first one.
    context_lens : int32 tensor [prefills], optional
        Tokens of each prefill that were stored before this step.
    prefill_query_lens, prefill_context_lens : list of int, optional
        New and stored tokens of each prefill, where they are known on the host.
    spans : list of pairs of int
        First and last new tokens, in the batch, of images whose tokens all see each other.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    max_decode_query_len: int
    prefill_start_loc: torch.Tensor | None
    context_lens: torch.Tensor | None
    prefill_query_lens: list[int] | None
    prefill_context_lens: list[int] | None
    spans: list[tuple[int, int]] = field(default_factory=list)


def _spans(common: Any) -> list[tuple[int, int]]:
    """What multimodal prefixes span of the new tokens; vLLM counts from the sequence's first."""
    ranges = getattr(common, "mm_req_doc_ranges", None)
    if not ranges or not any(ranges.values()):
        return []
    starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound
    if lengths is None:
        raise TQError(
            "this version of vLLM does not tell lengths of sequences with images on the host; "
            "serve this model without --attention-backend CUSTOM"
        )
    found = []
    for request, images in ranges.items():
        start, stop = starts[request : request + 2]
        # Where token 0 of the sequence would be in the batch.
        origin = stop - int(lengths[request])
        for first, last in images:
            inside = max(origin + first, start), min(origin + last, stop - 1)
            if inside[0] < inside[1]:
                found.append(inside)
    return found


def _host_lengths(common: Any, decodes: int, prefills: int) -> tuple[list[int], list[int] | None]:
    """New and stored tokens of prefills; the bound of their lengths that vLLM has is exact."""
    starts = common.query_start_loc_cpu[decodes : decodes + prefills + 1]
    new = starts.diff()
    lengths = common.seq_lens_cpu_upper_bound
    if lengths is None:
        return new.tolist(), None
    return new.tolist(), (lengths[decodes : decodes + prefills] - new).tolist()


class TurboQuantMetadataBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    """Build the metadata of a step without looking at device memory."""

    # Decodes read lengths and tables from device memory only, for one new token a sequence and
    # for a uniform number of speculated ones.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        report_cache(vllm_config)
        warn_of_padding(kv_cache_spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TurboQuantMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise TQError(
                "TurboQuant pages serve causal attention, and a layer attends to later tokens "
                "too; serve this model without --attention-backend CUSTOM"
            )
        threshold = self.reorder_batch_threshold
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=threshold
        )
        start = context = new_lens = stored_lens = None
        if prefills:
            new_lens, stored_lens = _host_lengths(common, decodes, prefills)
            start = common.query_start_loc[decodes : decodes + prefills + 1] - decode_tokens
            context = common.seq_lens[decodes : decodes + prefills] - (start[1:] - start[:-1])
        return TurboQuantMetadata(
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            query_start_loc=common.query_start_loc,
            slot_mapping=common.slot_mapping,
            num_tokens=common.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            num_prefills=prefills,
            max_decode_query_len=min(threshold, common.max_query_len),
            prefill_start_loc=start,
            context_lens=context,
            prefill_query_lens=new_lens,
            prefill_context_lens=stored_lens,
            spans=_spans(common),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> TurboQuantMetadata:
        metadata = self.build(0, common_attn_metadata)
        metadata.seq_lens.fill_(common_attn_metadata.max_query_len)  # short, so capture is quick
        return metadata

    def update_block_table(
        self, metadata: TurboQuantMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> TurboQuantMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)
