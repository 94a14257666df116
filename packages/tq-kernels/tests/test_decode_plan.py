"""``DecodePlan`` and ``decode``: the kernels that a device gets; on a GPU the NVIDIA ones too."""

from __future__ import annotations

import pytest
import torch
from tq_core import TQError
from tq_kernels import DecodePlan, KVFormat, decode, decode_ref, store_ref
from tq_kernels.nvidia import decode as nvidia
from tq_kernels.nvidia import ptx_emulator
from tq_kernels.nvidia.tile_loads import rows_of_a_line
from tq_kernels.testing import random_cache

GPU = torch.cuda.is_available() and torch.version.hip is None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 128, 1000, 0, 700]
on_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")


def check(fmt, heads, kv_heads, lengths, counts, dtype, *, kernels, seed=0, width=0, **options):
    """Compare a plan with float64: the error is at most twice that of the eager operation.

    Output, LSE and what no sequence uses of the cache, pages behind the window among it, are poisoned
    before. The block table gets ``width`` columns if it has fewer.
    """
    cache = random_cache(fmt, kv_heads, lengths, seed=seed, key_spread=2.0)
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(counts), heads, fmt.head_dim, generator=rng).to(dtype)
    extra = {n: options.pop(n) for n in ("sinks", "key_center") if n in options}
    cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    tables = (cache.pages, cache.block_table, cache.seq_lens, fmt)
    want, want_lse = decode_ref(q.double(), *tables, cu_query_lens=cu, **extra, **options)
    eager, _ = decode_ref(q, *tables, cu_query_lens=cu, **extra, **options)
    plan = DecodePlan(
        fmt,
        heads,
        kv_heads,
        max_batch=len(lengths),
        max_query_len=max(1, *counts),
        dtype=dtype,
        device=DEVICE,
        **options,
    )
    assert plan.kernels == kernels
    for length, count, table in zip(lengths, counts, cache.block_table, strict=True):
        behind = length - count + 1 - options.get("sliding_window", length)
        cache.pages[table[: max(0, behind) // fmt.page_size].long()] = 0xFF  # NaN as a scale
    here = cache.to(DEVICE)
    more = max(0, width - here.block_table.shape[1])
    out = torch.full_like(q, torch.nan).to(DEVICE)
    lse = torch.full(q.shape[:2], torch.nan, device=DEVICE)
    plan.run(
        q.to(DEVICE),
        here.pages,
        torch.nn.functional.pad(here.block_table, (0, more)),
        here.seq_lens,
        out,
        lse,
        cu_query_lens=cu.to(DEVICE),
        **{name: t.to(DEVICE) for name, t in extra.items()},
    )
    error, allowed = (out.cpu().double() - want).norm(), (eager.double() - want).norm()
    assert error <= 2 * allowed + 1e-6 * want.norm(), (float(error), float(allowed))
    seen = want_lse > -torch.inf
    assert torch.equal(lse.cpu() > -torch.inf, seen)
    # Queries have 16 bits: the error of a logit grows with the logits.
    largest = max(16.0, float(want_lse[seen].abs().max()))
    assert bool((lse.cpu().double() - want_lse)[seen].abs().max() < 3e-5 * largest)


@on_gpu
@pytest.mark.parametrize("v_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_all_formats(head_dim, k_bits, v_bits):
    fmt = KVFormat(head_dim, k_bits, v_bits)
    counts = [1] * len(LENGTHS)
    # These registers would not do: see `tq_kernels.nvidia.decode.unsupported`.
    kernels = "portable" if (head_dim, k_bits, v_bits) == (256, 8, 8) else "nvidia"
    check(fmt, 8, 2, LENGTHS, counts, torch.bfloat16, kernels=kernels)


@on_gpu
@pytest.mark.parametrize("v_bits", [2, 3, 4])
@pytest.mark.parametrize("k_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_formats_of_sixteen_rows(head_dim, k_bits, v_bits):
    fmt = KVFormat(head_dim, k_bits, v_bits, page_size=16 * k_bits)
    counts = [min(length, 4) for length in LENGTHS]
    check(fmt, 8, 2, LENGTHS, counts, torch.bfloat16, kernels="nvidia")


@on_gpu
@pytest.mark.parametrize("page_size", [32, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_page_sizes_and_dtypes(page_size, dtype):
    fmt = KVFormat(128, 4, 4, page_size=page_size)
    check(fmt, 8, 2, LENGTHS, [1] * len(LENGTHS), dtype, kernels="nvidia")


@on_gpu
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16])
def test_groups(group):
    fmt = KVFormat(128, 4, 3)
    counts = [1] * len(LENGTHS)
    check(fmt, 2 * group, 2, LENGTHS, counts, torch.bfloat16, kernels="nvidia")


@on_gpu
@pytest.mark.parametrize(
    "options",
    [
        {"soft_cap": 15.0},
        {"sliding_window": 100},
        {"sliding_window": 1},
        {"softmax_scale": 0.3},
        {"sinks": torch.linspace(-2, 3, 8)},
        {"key_center": torch.linspace(-1, 1, 256).reshape(2, 128)},
        {
            "soft_cap": 15.0,
            "sliding_window": 70,
            "sinks": torch.linspace(-2, 3, 8),
            "key_center": torch.linspace(-1, 1, 256).reshape(2, 128),
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_options_with_several_queries(options):
    lengths, counts = [33, 700, 4, 65, 0], [4, 33, 1, 2, 0]
    fmt = KVFormat(128, 4, 4)
    check(fmt, 8, 2, lengths, counts, torch.bfloat16, kernels="nvidia", **options)


@on_gpu
@pytest.mark.parametrize("group", [4, 6])
@pytest.mark.parametrize(
    "options",
    [
        {"soft_cap": 15.0, "sinks": torch.linspace(-2, 3, 2)},
        {"sliding_window": 70},
        {"key_center": torch.linspace(-1, 1, 256).reshape(2, 128)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_with_one_query(options, group):
    lengths = [33, 700, 4, 65, 1]
    if "sinks" in options:
        options = {**options, "sinks": options["sinks"].repeat_interleave(group)}
    check(KVFormat(128, 4, 4), 2 * group, 2, lengths, [1] * 5, torch.bfloat16, kernels="nvidia",
          **options)  # fmt: skip


@on_gpu
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rounds_of_the_rotation(head_dim, rounds):
    fmt = KVFormat(head_dim, 4, 4, rounds=rounds, seed=7)
    check(fmt, 8, 2, LENGTHS, [1] * len(LENGTHS), torch.float16, kernels="nvidia")


@on_gpu
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_queries_of_any_size(size):
    fmt = KVFormat(128, 4, 4)
    cache = random_cache(fmt, 2, [100], seed=1).to("cuda")
    q = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(2)).to(
        "cuda", torch.bfloat16
    )
    q = (q.float() * size).bfloat16()
    plan = DecodePlan(fmt, 8, 2, max_batch=1, dtype=torch.bfloat16, device="cuda",
                      softmax_scale=0.1 / size)  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(1, 8, device="cuda")
    plan.run(q, cache.pages, cache.block_table, cache.seq_lens, out, lse)
    want, _ = decode_ref(q.double(), cache.pages, cache.block_table, cache.seq_lens, fmt,
                         softmax_scale=0.1 / size)  # fmt: skip
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


@on_gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_haar_rotation_and_a_long_sequence_among_short_ones(head_dim):
    fmt = KVFormat(head_dim, 3, 3, rotation="haar", seed=5)
    lengths = [30000, *[5] * 70]
    check(fmt, 4, 1, lengths, [1] * len(lengths), torch.float16, kernels="nvidia")


@on_gpu
def test_a_captured_graph_stays_right_when_lengths_change():
    fmt = KVFormat(128, 4, 4)
    cache = random_cache(fmt, 2, [700, 700], seed=3).to("cuda")
    plan = DecodePlan(fmt, 8, 2, max_batch=2, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(2, 8, 128, device="cuda").bfloat16()
    out, lse = torch.empty_like(q), torch.empty(2, 8, device="cuda")
    lengths = cache.seq_lens.clone()
    plan.run(q, cache.pages, cache.block_table, lengths, out, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, cache.pages, cache.block_table, lengths, out, lse)
    for new in ([700, 3], [64, 65], [1, 699]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        want, want_lse = decode_ref(q, cache.pages, cache.block_table, lengths, fmt)
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, want_lse, atol=5e-4, rtol=0)


@pytest.mark.parametrize("max_query_len", [1, 3])
def test_plans_warm_up_on_empty_sequences(max_query_len):
    plan = DecodePlan(KVFormat(64), 4, 2, max_batch=3, max_query_len=max_query_len,
                      dtype=torch.float16, device=DEVICE)  # fmt: skip
    seen = []
    run = plan.run
    plan.run = lambda *args, **options: (seen.append((args, options)), run(*args, **options))
    sinks = torch.zeros(4, device=DEVICE)
    plan.warm_up(sinks=sinks)
    assert [len(args[0]) for args, _ in seen] == [1, 1, 2, 2, 3, 3]
    assert {args[2].shape[1] for args, _ in seen} == {1, 1024}
    for args, options in seen:
        assert options["sinks"] is sinks
        assert (options["cu_query_lens"] is None) == (max_query_len == 1)
        assert bool((args[4] == 0).all())
        assert bool((args[5] == 0).all())  # of the sinks alone


@pytest.mark.parametrize(("head_dim", "dtype"), [(96, torch.bfloat16), (64, torch.float32)])
def test_others_get_the_portable_kernels(head_dim, dtype):
    fmt = KVFormat(head_dim, 3, 4)
    check(fmt, 4, 2, [1, 40], [1, 1], dtype, kernels="portable")


def test_decode_has_the_arguments_and_results_of_its_reference():
    fmt = KVFormat(64, 4, 3)
    cache = random_cache(fmt, 2, [33, 5, 20], seed=1).to(DEVICE)
    q = torch.randn(5, 4, 64, device=DEVICE).half()
    cu = torch.tensor([0, 3, 4, 5], device=DEVICE)
    arguments = (q, cache.pages, cache.block_table.long(), cache.seq_lens.long(), fmt)
    options = {"cu_query_lens": cu, "soft_cap": 20.0, "sinks": torch.randn(4, device=DEVICE)}
    out, lse = decode(*arguments, **options)
    want, want_lse = decode_ref(*arguments, **options)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(lse, want_lse, atol=5e-4, rtol=0)


def test_a_plan_names_what_it_cannot_take():
    fmt = KVFormat(64)
    with pytest.raises(TQError, match="heads=6"):
        DecodePlan(fmt, 6, 4, max_batch=1, device=DEVICE)
    plan = DecodePlan(fmt, 4, 2, max_batch=1, dtype=torch.float16, device=DEVICE)
    cache = random_cache(fmt, 2, [3, 3], seed=1).to(DEVICE)
    q = torch.zeros(2, 4, 64, dtype=torch.float16, device=DEVICE)
    lse = torch.empty(2, 4, device=DEVICE)
    with pytest.raises(TQError, match="larger plan"):
        plan.run(q, cache.pages, cache.block_table, cache.seq_lens, q, lse)


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """A CPU that passes for an NVIDIA GPU with one multiprocessor, its PTX emulated."""
    if torch.cuda.is_available():
        pytest.skip("tested on the GPU itself")
    ptx_emulator.install(monkeypatch)
    monkeypatch.setattr(nvidia, "unsupported", lambda spec: None)
    monkeypatch.setattr(nvidia, "_of_device", lambda device: ((8, 0), 1, 164 * 1024))


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "v_bits"),
    [(64, 4, 4), (64, 3, 2), (128, 4, 4), (128, 3, 3), (128, 2, 8), (128, 8, 2), (256, 4, 3)],
)
def test_emulated_formats(one_multiprocessor, head_dim, k_bits, v_bits):
    check(
        KVFormat(head_dim, k_bits, v_bits),
        4,
        1,
        [1, 63, 130, 0],
        [1, 1, 1, 0],
        torch.float16,
        kernels="nvidia",
    )


def test_every_way_to_share_lines_is_among_the_formats():
    pairs = [(64, 4), (64, 3), (128, 4), (128, 3), (128, 2), (128, 8), (256, 4)]
    assert {rows_of_a_line(*pair) for pair in pairs} == {1, 2, 4}


@pytest.mark.parametrize("heads", [1, 7, 16])
def test_emulated_groups(one_multiprocessor, heads):
    check(KVFormat(128, 4, 4), heads, 1, [65, 16], [1, 1], torch.float16, kernels="nvidia")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 64},
        {"soft_cap": 15.0, "sliding_window": 70, "sinks": torch.linspace(-2, 3, 4)},
        {"key_center": torch.linspace(-1, 1, 128).reshape(1, 128), "softmax_scale": 0.2},
    ],
    ids=["plain", "window", "center"],
)
def test_emulated_several_queries(one_multiprocessor, options, dtype):
    check(KVFormat(128, 4, 4), 4, 1, [130, 17], [4, 2], dtype, kernels="nvidia", **options)


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "v_bits", "page_size"),
    [(128, 4, 4, 16), (128, 3, 3, 64), (128, 2, 4, 32), (64, 8, 3, 128), (64, 4, 2, 16)],
)
def test_emulated_sixteen_rows(one_multiprocessor, head_dim, k_bits, v_bits, page_size):
    """bf16 queries: those of fp16 take the kernel that keeps 16 bits of the weights."""
    fmt = KVFormat(head_dim, k_bits, v_bits, page_size)
    check(fmt, 4, 1, [70, 17, 129, 3], [4, 2, 1, 3], torch.bfloat16, kernels="nvidia")


def test_emulated_more_rows_than_a_program(one_multiprocessor):
    check(KVFormat(64, 4, 4), 14, 1, [90], [3], torch.bfloat16, kernels="nvidia")


def test_emulated_logits_that_rise(one_multiprocessor):
    """Sums are rescaled each time that logits leave what they are relative to far behind."""
    fmt, length = KVFormat(64, 4, 4), 400
    rising = torch.arange(length)[:, None] / 8 * torch.ones(64)
    cache = random_cache(fmt, 1, [length], seed=3)
    k = rising[:, None].bfloat16()
    store_ref(k, torch.randn_like(k), cache.pages, cache.slots(0), fmt)
    q = torch.full((4, 4, 64), 1.0).bfloat16()
    plan = DecodePlan(fmt, 4, 1, max_batch=1, max_query_len=4, dtype=q.dtype, device=DEVICE,
                      softmax_scale=0.5)  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(4, 4)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    tables = (cache.pages, cache.block_table, cache.seq_lens)
    plan.run(q, *tables, out, lse, cu_query_lens=cu)
    want, want_lse = decode_ref(q.double(), *tables, fmt, cu_query_lens=cu, softmax_scale=0.5)
    assert float(want_lse.max()) > 1000
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("head_dim", "queries", "dtype"),
    [(64, 1, torch.float16), (256, 1, torch.float16), (64, 4, torch.bfloat16)],
)
def test_emulated_other_rotations(one_multiprocessor, head_dim, queries, dtype):
    fmt = KVFormat(head_dim, 3, 3, rotation="haar", seed=5)
    check(fmt, 4, 1, [70], [queries], dtype, kernels="nvidia")


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_emulated_many_rows(one_multiprocessor, rotation):
    """Results of 16 rows are rotated back at once, a slice of the matrix at a time."""
    fmt = KVFormat(256, 4, 4, rotation=rotation)
    check(fmt, 1, 1, [5] * 17, [1] * 17, torch.float16, kernels="nvidia")


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize(("head_dim", "queries"), [(64, 1), (256, 1), (64, 4)])
def test_emulated_rounds_of_the_rotation(one_multiprocessor, head_dim, queries, rounds):
    """One query is rotated by the kernel that attends, four by the kernel before it."""
    fmt = KVFormat(head_dim, 4, 4, rounds=rounds, seed=7)
    check(fmt, 4, 1, [70], [queries], torch.float16, kernels="nvidia")


def test_emulated_two_heads(one_multiprocessor):
    check(KVFormat(64, 4, 4), 4, 2, [70, 17], [1, 1], torch.float16, kernels="nvidia")


def test_wrong_codes_would_be_seen(one_multiprocessor, monkeypatch):
    """The emulation computes what the text says: another text gives another result."""
    permute = ptx_emulator.INSTRUCTIONS["prmt.b32"]
    swapped = {"prmt.b32": lambda a, b, selector: permute(b, a, selector)}
    monkeypatch.setattr(ptx_emulator, "INSTRUCTIONS", {**ptx_emulator.INSTRUCTIONS, **swapped})
    with pytest.raises(AssertionError):
        check(KVFormat(128, 4, 4), 4, 1, [65], [1], torch.float16, kernels="nvidia")


class Launches:
    """Stands for a kernel, and notes with which constants it is launched."""

    def __init__(self):
        self.seen = set()

    def __getitem__(self, grid):
        return lambda *args, **constants: self.seen.add(tuple(sorted(constants.items())))


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches nothing: no test of a GPU")
@pytest.mark.parametrize(
    ("query_len", "dtype"), [(1, torch.float16), (4, torch.float16), (4, torch.bfloat16)]
)
def test_warming_up_compiles_what_runs_of_any_size_need(monkeypatch, query_len, dtype):
    monkeypatch.setattr(nvidia, "unsupported", lambda spec: None)
    monkeypatch.setattr(nvidia, "_of_device", lambda device: ((9, 0), 132, 228 * 1024))
    names = ("prepare_queries", "decode_partials", "decode_wide", "combine_partials")
    kernels = {name: Launches() for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(nvidia, name, kernel)
    fmt = KVFormat(128)
    options = {"max_batch": 40, "max_query_len": query_len, "dtype": dtype}
    plan = DecodePlan(fmt, 32, 8, device="cpu", **options)
    assert plan.kernels == "nvidia"
    plan.warm_up()
    warmed = {name: set(kernel.seen) for name, kernel in kernels.items()}
    pages = torch.zeros(1, 8, fmt.record_bytes, dtype=torch.uint8)
    for batch in (1, 3, 8, 33, 40):
        for width in (1, 7, 8, 64, 500, 9000):
            q = torch.zeros(batch * query_len, 32, 128, dtype=dtype)
            plan.run(
                q,
                pages,
                torch.zeros(batch, width, dtype=torch.int32),
                torch.full((batch,), query_len, dtype=torch.int32),
                torch.empty_like(q),
                torch.empty(batch * query_len, 32),
                cu_query_lens=torch.arange(batch + 1, dtype=torch.int32) * query_len,
            )
    assert {name: kernel.seen for name, kernel in kernels.items()} == warmed
