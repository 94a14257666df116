"""The backend without an engine: batches of all kinds against attention on dequantized pages.

After the tests of vLLM's own backends: batches of decodes, prefills and both, on block tables in
random order, filled through ``do_kv_cache_update``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tq_kernels import KVFormat, dequantize_ref

BATCHES = {  # name: lengths of the sequences, new tokens of each (decodes first)
    "one-decode": ([33], [1]),
    "decodes": ([1, 16, 40, 65], [1, 1, 1, 1]),
    "speculated": ([9, 40, 70], [3, 3, 3]),
    "first-prefill": ([17, 48], [17, 48]),
    "chunk-after-context": ([40, 70], [8, 38]),
    "one-new-token-after-context": ([40, 64], [5, 16]),
    "mixed": ([33, 50, 40, 70, 21], [1, 1, 9, 38, 21]),
    "mixed-cached-prefix": ([64, 80], [1, 16]),
}


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page: int = 16
    k_bits: int = 4
    v_bits: int = 4
    prefill: str = "exact"
    speculated: int = 0
    soft_cap: float | None = None
    window: int | None = None
    sinks: bool = False
    layout: str = "LBHNC"
    dtype: torch.dtype = torch.float32
    shared: bool = False
    fused: bool = False
    #: Images: sequence, and the first and last of its tokens.
    images: tuple[tuple[int, int, int], ...] = ()

    def __str__(self) -> str:
        default = Case()
        changed = (f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n))
        return "-".join(str(c).replace("torch.", "") for c in changed) or "default"


#: In the middle of new tokens, at both ends of them, two of a sequence, of stored tokens, of one.
IMAGES = ((0, 3, 9), (0, 12, 16), (1, 0, 5), (1, 38, 47), (2, 35, 39), (3, 40, 40), (3, 60, 69))
CASES = [
    Case(),
    Case(prefill="stored"),
    Case(dim=80, k_bits=3, v_bits=3),
    Case(dim=96, k_bits=4, v_bits=3, page=32),
    Case(dim=128, k_bits=8, v_bits=4, heads=8),
    Case(dim=256, k_bits=2, v_bits=2, heads=2),
    Case(heads=6, kv_heads=1, page=64),
    Case(heads=3, kv_heads=3),
    Case(speculated=2),
    Case(window=20),
    Case(window=20, prefill="stored"),
    Case(soft_cap=5.0),
    Case(sinks=True),
    Case(layout="BLHNC"),
    Case(dtype=torch.bfloat16, dim=128),
    Case(dtype=torch.float16, dim=128),
    Case(shared=True),
    Case(fused=True),
    Case(fused=True, window=20, layout="BLHNC"),
    Case(fused=True, prefill="stored", speculated=2, window=20, sinks=True),
    Case(images=IMAGES),
    Case(images=IMAGES, window=20, sinks=True, soft_cap=5.0),
    Case(images=IMAGES, prefill="stored"),
    Case(images=IMAGES, speculated=2),
    Case(images=IMAGES, fused=True),
]


@pytest.fixture(scope="module")
def vllm_config(tiny):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(tiny), dtype="float32", max_model_len=256).create_engine_config()


def attention(q, k, v, positions, case, sinks, images=()):
    """Plain attention of queries at ``positions`` on keys 0, 1, 2 … in float64."""
    group = case.heads // case.kv_heads
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.double(), k) * case.dim**-0.5
    if case.soft_cap is not None:
        logits = case.soft_cap * torch.tanh(logits / case.soft_cap)
    keys = torch.arange(len(k))
    hidden = keys > positions[:, None]
    if case.window is not None:
        hidden |= keys <= positions[:, None] - case.window
    for first, last in images:
        inside = [(first <= x) & (x <= last) for x in (positions, keys)]
        hidden &= ~(inside[0][:, None] & inside[1])
    logits = logits.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, len(q), 1)
        logits = torch.cat((logits, column), dim=-1)
        v = torch.cat((v, torch.zeros_like(v[:1])))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


# Triton's interpreter is slow: fused operations get the batches that tell most.
PAIRS = [
    (case, batch)
    for case in CASES
    for batch in BATCHES
    if not case.fused or batch in ("mixed", "speculated" if case.speculated else "decodes")
]


@pytest.mark.parametrize(("case", "batch"), PAIRS, ids=str)
def test_batches_agree_with_attention_on_dequantized_pages(vllm_config, monkeypatch, case, batch):
    from tq_vllm.backend import TurboQuantBackend
    from tq_vllm.ops import FusedOps
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    monkeypatch.setenv("TQ_K_BITS", str(case.k_bits))
    monkeypatch.setenv("TQ_V_BITS", str(case.v_bits))
    monkeypatch.setenv("TQ_PREFILL", case.prefill)
    lengths, new = BATCHES[batch]
    images = {
        row: [(a, b) for r, a, b in case.images if r == row and b < lengths[row]]
        for row in range(len(lengths))
    }
    torch.manual_seed(len(batch) + case.dim)
    sinks = torch.randn(case.heads) if case.sinks else None

    spec = TurboQuantBackend.customize_spec(
        FullAttentionSpec(
            block_size=case.page,
            num_kv_heads=case.kv_heads,
            head_size=case.dim,
            dtype=case.dtype,
        )
    )
    fmt = KVFormat(case.dim, case.k_bits, case.v_bits, case.page)
    assert spec.page_size_bytes == case.kv_heads * case.page * fmt.slot_bytes
    config = SimpleNamespace(
        speculative_config=(
            SimpleNamespace(num_speculative_tokens=case.speculated, parallel_drafting=False)
            if case.speculated
            else None
        ),
        parallel_config=vllm_config.parallel_config,
    )
    with (
        set_current_vllm_config(vllm_config),
        set_default_torch_dtype(case.dtype),
    ):
        impl = TurboQuantBackend.get_impl_cls()(
            case.heads, case.dim, case.dim**-0.5, case.kv_heads, None, case.window, "auto",
            case.soft_cap, kv_sharing_target_layer_name="other" if case.shared else None,
            **({"sinks": sinks} if case.sinks else {}),
        )  # fmt: skip
    if case.fused:
        shape = replace(
            impl.ops.shape,
            max_batch=5,
            max_decode_query_len=1 + case.speculated,
            max_tokens=80,
        )
        impl.ops = FusedOps(shape, sinks)
    builder_cls = TurboQuantBackend.get_builder_cls()
    monkeypatch.setattr("tq_vllm.metadata.report_cache", lambda _: None)
    builder = builder_cls(spec, ["layer"], config, torch.device("cpu"))

    # Pages in random order; the last one belongs to nobody.
    used = [-(-n // case.page) for n in lengths]
    order = torch.randperm(sum(used)).int()
    table = torch.full((len(lengths), max(used) + 1), 10**6, dtype=torch.int32)
    at = 0
    for row, count in enumerate(used):
        table[row, :count] = order[at : at + count]
        at += count
    pages, record = sum(used) + 1, case.page * fmt.slot_bytes
    layers = 3 if case.layout == "BLHNC" else 1
    # What pages of other layers left behind: as scales these bytes are no numbers.
    buffer = torch.full((pages, layers, case.kv_heads, record), 255, dtype=torch.uint8)
    cache = buffer[:, layers // 2].view(pages, case.kv_heads, case.page, fmt.slot_bytes)

    def slots(row: int, first: int, last: int) -> torch.Tensor:
        token = torch.arange(first, last)
        return table[row, token // case.page].long() * case.page + token % case.page

    whole = [torch.randn(2, n, case.kv_heads, case.dim).to(case.dtype) for n in lengths]
    for row, (n, m) in enumerate(zip(lengths, new, strict=True)):
        k, v = whole[row][:, : n - m]
        impl.do_kv_cache_update(None, k, v, cache, slots(row, 0, n - m))

    if case.window is not None:  # vLLM gives pages behind the window to other layers
        for row, (n, m) in enumerate(zip(lengths, new, strict=True)):
            table[row, : max(0, n - m - case.window + 1) // case.page] = pages - 1

    padding = 3
    rows = sum(new)
    q = torch.randn(rows + padding, case.heads, case.dim).to(case.dtype)
    k, v = torch.cat([w[:, n - m :] for w, n, m in zip(whole, lengths, new, strict=True)], dim=1)
    nothing = k.new_full((padding, case.kv_heads, case.dim), math.nan)
    k, v = torch.cat((k, nothing)), torch.cat((v, nothing))
    mapping = torch.cat(
        [slots(r, n - m, n) for r, (n, m) in enumerate(zip(lengths, new, strict=True))]
    )
    mapping = torch.cat((mapping, torch.full((padding,), -1)))
    starts = torch.tensor([0, *new]).cumsum(0).int()
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(new),
        num_actual_tokens=rows,
        max_query_len=max(new),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=mapping,
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        **({"mm_req_doc_ranges": images} if case.images else {}),
    )
    metadata = builder.build(0, common)
    threshold = case.speculated + 1
    decodes = next((i for i, m in enumerate(new) if m > threshold), len(new))
    assert (metadata.num_decodes, metadata.num_prefills) == (decodes, len(new) - decodes)
    out = torch.full_like(q, math.nan)
    impl.do_kv_cache_update(None, k, v, cache, mapping)
    impl.forward(None, q, k, v, cache, metadata, out)

    assert (buffer[-1] == 255).all()
    if layers > 1:
        assert (buffer[:, [0, 2]] == 255).all()
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
    stored = case.prefill == "stored" or case.shared
    errors = []
    for row, (n, m) in enumerate(zip(lengths, new, strict=True)):
        records = cache.view(pages, case.kv_heads, record)
        first = max(0, n - m - (case.window or n) + 1)  # what is before may be gone
        kept_k, kept_v = (x.new_zeros(n, *x.shape[1:]) for x in (k.float(), v.float()))
        kept_k[first:], kept_v[first:] = dequantize_ref(records, slots(row, first, n), fmt)
        if row >= decodes and not stored:  # new tokens see each other at 16 bits
            kept_k[n - m :], kept_v[n - m :] = whole[row][:, n - m :].float()
        positions = torch.arange(n - m, n)
        part = q[starts[row] : starts[row + 1]]
        got = out[starts[row] : starts[row + 1]].double()
        # Only new tokens see later ones: those before are in the cache, as they were computed.
        seen = [(max(a, n - m), b) for a, b in images[row]]
        want = attention(part, kept_k, kept_v, positions, case, sinks, seen)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        exact = attention(part, *whole[row], positions, case, sinks, seen)
        errors.append(((got - exact).square().sum(), exact.square().sum()))
    assert out[rows:].isnan().all()
    error, energy = (float(sum(x)) for x in zip(*errors, strict=True))
    # Distortion of the values (theory: 4^-b * 2.72), that of the keys through the softmax.
    bound = 2.72 * 4.0**-case.v_bits + 3 * 2.72 * 4.0**-case.k_bits
    assert error <= bound * energy


class RecordingOps:
    """Notes what it is asked for; computes nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple]] = []

    def __getattr__(self, name: str):
        return lambda *arguments: self.asked.append((name, arguments))


@pytest.mark.parametrize("prefill", ["exact", "stored"])
@pytest.mark.parametrize("speculated", [0, 3])
def test_no_tensor_of_the_device_is_read_on_the_host(vllm_config, monkeypatch, prefill, speculated):
    """Tensors without memory stand for the device's: reading one of their values raises."""
    from tq_vllm.backend import TurboQuantBackend
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    monkeypatch.setenv("TQ_PREFILL", prefill)
    monkeypatch.setattr("tq_vllm.metadata.report_cache", lambda _: None)
    with set_current_vllm_config(vllm_config):
        impl = TurboQuantBackend.get_impl_cls()(4, 128, 0.1, 2)
    impl.ops = ops = RecordingOps()
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)
    speculation = SimpleNamespace(num_speculative_tokens=speculated, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=speculation if speculated else None,
        parallel_config=vllm_config.parallel_config,
    )
    builder = TurboQuantBackend.get_builder_cls()(
        TurboQuantBackend.customize_spec(spec), ["layer"], config, torch.device("meta")
    )
    new, lengths = [1, 1 + speculated, 9, 20], [40, 33, 60, 20]
    starts = torch.tensor([0, *new]).cumsum(0).int()
    tokens = sum(new)
    on_device = {"device": "meta", "dtype": torch.int32}
    common = CommonAttentionMetadata(
        query_start_loc=torch.empty(5, **on_device),
        query_start_loc_cpu=starts,
        seq_lens=torch.empty(4, **on_device),
        num_reqs=4,
        num_actual_tokens=tokens,
        max_query_len=20,
        max_seq_len=60,
        block_table_tensor=torch.empty(4, 8, **on_device),
        slot_mapping=torch.empty(tokens, device="meta", dtype=torch.int64),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
    )
    q = torch.empty(tokens, 4, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(tokens, 2, 128, device="meta", dtype=torch.bfloat16)
    cache = torch.empty(9, 2, 16, 132, device="meta", dtype=torch.uint8)
    metadata = builder.build(0, common)
    impl.do_kv_cache_update(None, k, k, cache, common.slot_mapping)
    impl.forward(None, q, k, k, cache, metadata, torch.empty_like(q))
    names = [name for name, _ in ops.asked]
    assert names == ["store", "decode", "prefill" if prefill == "exact" else "prefill_stored"]
    decode, last = ops.asked[1][1], ops.asked[2][1]
    assert decode[0].shape[0] == 2 + speculated
    assert (decode[1].cu_query_lens is None) == (not speculated)
    assert last[0].shape[0] == 29
    assert (last[-2].query_lens_host, last[-2].context_lens_host) == ([9, 20], [51, 0])
    with pytest.raises(RuntimeError, match="meta"):
        metadata.seq_lens.tolist()


def test_layers_share_buffers_whose_size_knows_no_context_length():
    from tq_vllm.ops import FusedOps, LayerShape, _decode_plan, _prefill_plan

    shape = LayerShape(4, 2, 0.1, max_batch=4, max_decode_query_len=3, max_tokens=64)
    fmt, device = KVFormat(128), torch.device("cpu")
    for _ in range(3):  # layers
        FusedOps(shape).reserve(fmt, torch.float32, device)
    assert _decode_plan.cache_info().hits >= 4
    assert _prefill_plan.cache_info().hits >= 2
    plan, lse = _decode_plan(shape, fmt, 3, torch.float32, device)
    assert lse.shape == (12, 4)
    assert plan.workspace_bytes < 2**22


def test_kernels_warm_up_with_what_the_layers_pass(monkeypatch) -> None:
    import tq_kernels
    from tq_vllm import ops

    small = partial(tq_kernels.PrefillPlan, scratch_tokens=8)
    monkeypatch.setattr(tq_kernels, "PrefillPlan", small)
    stored: list[tuple[object, ...]] = []
    warm_up_store = ops.warm_up_store
    monkeypatch.setattr(
        ops, "warm_up_store", lambda *args: (stored.append(args), warm_up_store(*args))
    )
    shape = ops.LayerShape(4, 2, 0.1, max_batch=2, max_decode_query_len=2, max_tokens=20)
    cpu = torch.device("cpu")
    fmt = tq_kernels.KVFormat(64)
    ops._warm_up(shape, fmt, torch.float32, cpu, torch.float32, torch.float32)
    assert stored == [(fmt, 2, 20, torch.float32, cpu)]


def test_buffers_are_there_when_memory_was_measured(vllm_config, monkeypatch):
    """vLLM runs layers without a batch then; steps find the plans that this made."""
    from tq_vllm.backend import TurboQuantBackend
    from tq_vllm.ops import Decodes, FusedOps, Prefills, _decode_plan, _prefill_plan
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        impl = TurboQuantBackend.get_impl_cls()(4, 64, 0.125, 2)
    shape = replace(impl.ops.shape, max_batch=2, max_decode_query_len=3, max_tokens=32)
    impl.ops = FusedOps(shape)
    for plans in (_decode_plan, _prefill_plan):
        plans.cache_clear()
    q, k = torch.randn(20, 4, 64), torch.randn(20, 2, 64)
    out = torch.full_like(q, math.nan)
    impl.forward(None, q, k, k, torch.tensor([]), None, out)
    assert (out == 0).all()
    made = [plans.cache_info().misses for plans in (_decode_plan, _prefill_plan)]
    assert made == [2, 1]  # one query a sequence, and several

    size = vllm_config.cache_config.block_size
    fmt = KVFormat(64, page_size=size)
    pages = fmt.allocate_pages(2, 2)
    table, lengths = torch.tensor([[0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    slots = torch.arange(3)
    impl.ops.store(k[:3], k[:3], pages, slots, fmt)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    impl.ops.decode(q[:1], Decodes(pages, fmt, table, lengths, None), out[:1])
    impl.ops.decode(q[:3], Decodes(pages, fmt, table, lengths, starts), out[:3])
    impl.ops.prefill(q[:3], k[:3], k[:3], Prefills(pages, fmt, table, starts, none, slots), out[:3])
    assert [plans.cache_info().misses for plans in (_decode_plan, _prefill_plan)] == made
