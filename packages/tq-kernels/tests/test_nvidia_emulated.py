"""The NVIDIA decode kernels without a GPU: Triton's interpreter, with inline PTX emulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tq_kernels import KVFormat, decode_ref
from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.nvidia import decode as nvidia
from tq_kernels.nvidia import ptx_emulator
from tq_kernels.nvidia.tile_loads import rows_of_a_line
from tq_kernels.testing import random_cache

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tested on the GPU itself")


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """A CPU that passes for an NVIDIA GPU with one multiprocessor."""
    ptx_emulator.install(monkeypatch)
    monkeypatch.setattr(nvidia, "unsupported", lambda spec: None)
    monkeypatch.setattr(nvidia, "_of_device", lambda device: ((8, 0), 1))


def plan_of(fmt, heads, kv_heads, batch, query_len, **options):
    names = ("softmax_scale", "soft_cap", "sliding_window")
    return nvidia.NvidiaDecodePlan(
        AttentionSpec(
            fmt,
            heads,
            kv_heads,
            batch,
            query_len,
            torch.float16,
            torch.device("cpu"),
            *(options.get(name) for name in names),
        )
    )


def check(fmt, heads, kv_heads, lengths, counts, *, width=None, **options):
    """Outputs as of the reference in float64, to twice the error of the eager operation."""
    cache = random_cache(fmt, kv_heads, lengths, seed=3, key_spread=2.0)
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(sum(counts), heads, fmt.head_dim, generator=rng).half()
    extra = {n: options.pop(n) for n in ("sinks", "key_center") if n in options}
    cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    pages = (cache.pages, cache.block_table, cache.seq_lens)
    want, want_lse = decode_ref(q.double(), *pages, fmt, cu_query_lens=cu, **extra, **options)
    eager, _ = decode_ref(q, *pages, fmt, cu_query_lens=cu, **extra, **options)
    plan = plan_of(fmt, heads, kv_heads, len(lengths), max(1, *counts), **options)
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:2], torch.nan)
    table = cache.block_table
    if width is not None:  # entries that no sequence uses, and more programs
        table = torch.nn.functional.pad(table, (0, width - table.shape[1]), value=0)
    plan.run(q, pages[0], table, pages[2], out, lse, cu_query_lens=cu, **extra)
    error, allowed = (out.double() - want).norm(), (eager.double() - want).norm()
    assert error <= 2 * allowed + 1e-6 * want.norm(), (float(error), float(allowed))
    seen = want_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert bool((lse.double() - want_lse)[seen].abs().max() < 5e-4)


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "v_bits"),
    [(64, 4, 4), (64, 3, 2), (128, 4, 4), (128, 3, 3), (128, 2, 8), (128, 8, 2), (256, 4, 3)],
)
def test_formats(one_multiprocessor, head_dim, k_bits, v_bits):
    check(KVFormat(head_dim, k_bits, v_bits), 4, 1, [1, 63, 130, 0], [1, 1, 1, 0])


def test_every_way_to_share_lines_is_among_the_formats():
    pairs = [(64, 4), (64, 3), (128, 4), (128, 3), (128, 2), (128, 8), (256, 4)]
    assert {rows_of_a_line(*pair) for pair in pairs} == {1, 2, 4}


@pytest.mark.parametrize("heads", [1, 7, 16])
def test_groups(one_multiprocessor, heads):
    check(KVFormat(128, 4, 4), heads, 1, [65, 16], [1, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"width": 64},
        {"soft_cap": 15.0, "sliding_window": 70, "sinks": torch.linspace(-2, 3, 4)},
        {"key_center": torch.linspace(-1, 1, 128).reshape(1, 128), "softmax_scale": 0.2},
    ],
    ids=["plain", "window", "center"],
)
def test_several_queries(one_multiprocessor, options):
    check(KVFormat(128, 4, 4), 4, 1, [70, 17], [4, 2], **options)


def test_other_rotations(one_multiprocessor):
    check(KVFormat(64, 3, 3, rotation="haar", seed=5), 4, 1, [70], [1])


def test_two_heads(one_multiprocessor):
    check(KVFormat(64, 4, 4), 4, 2, [70, 17], [1, 1])


def test_wrong_codes_would_be_seen(one_multiprocessor, monkeypatch):
    """The emulation computes what the text says: another text gives another result."""
    permute = ptx_emulator.INSTRUCTIONS["prmt.b32"]
    swapped = {"prmt.b32": lambda a, b, selector: permute(b, a, selector)}
    monkeypatch.setattr(ptx_emulator, "INSTRUCTIONS", {**ptx_emulator.INSTRUCTIONS, **swapped})
    with pytest.raises(AssertionError):
        check(KVFormat(128, 4, 4), 4, 1, [65], [1])


class Launches:
    """Stands for a kernel, and notes with which constants it is launched."""

    def __init__(self):
        self.seen = set()

    def __getitem__(self, grid):
        return lambda *args, **constants: self.seen.add(tuple(sorted(constants.items())))


@pytest.mark.parametrize("query_len", [1, 4])
def test_warming_up_compiles_what_runs_of_any_size_need(monkeypatch, query_len):
    from tq_kernels import DecodePlan

    monkeypatch.setattr(nvidia, "unsupported", lambda spec: None)
    monkeypatch.setattr(nvidia, "_of_device", lambda device: ((9, 0), 132))
    kernels = {n: Launches() for n in ("prepare_queries", "decode_partials", "combine_partials")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(nvidia, name, kernel)
    fmt = KVFormat(128)
    options = {"max_batch": 40, "max_query_len": query_len, "dtype": torch.float16}
    plan = DecodePlan(fmt, 32, 8, device="cpu", **options)
    assert plan.kernels == "nvidia"
    plan.warm_up()
    warmed = {name: set(kernel.seen) for name, kernel in kernels.items()}
    pages = torch.zeros(1, 8, fmt.record_bytes, dtype=torch.uint8)
    for batch in (1, 3, 8, 33, 40):
        for width in (1, 7, 8, 64, 500, 9000):
            q = torch.zeros(batch * query_len, 32, 128, dtype=torch.float16)
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


def test_byte_permutation():
    """``prmt`` as the manual has it: the sign of the chosen byte where bit 3 is set."""
    a, b = np.uint32(0x83020100), np.uint32(0x07060504)
    got = ptx_emulator.run("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, np.uint32(0x0BF3)])
    assert (got[0] == 0x00FF0083).all()
