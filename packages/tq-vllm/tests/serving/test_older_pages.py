"""The specification that vLLM 0.26 gets. It is one that newer versions understand as well."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tq_kernels import KVFormat
from tq_vllm import older_pages, pages
from tq_vllm.backend import TurboQuantBackend
from tq_vllm.settings import load_settings
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec


@pytest.mark.parametrize("bits", [(4, 4), (4, 3), (3, 3), (2, 2), (8, 4)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_a_page_is_exactly_a_page_of_codes(dim, bits) -> None:
    fmt = KVFormat(dim, *bits, 48)
    common = {"block_size": 48, "num_kv_heads": 3, "head_size": dim, "dtype": torch.bfloat16}
    for plain in (FullAttentionSpec(**common), SlidingWindowSpec(**common, sliding_window=64)):
        spec = older_pages.older_spec(plain, fmt.slot_bytes)
        assert type(spec) is type(plain)
        assert spec.page_size_bytes == 3 * fmt.record_bytes
        shape = older_pages.OlderPages.get_kv_cache_shape(7, 48, 3, spec.head_size)
        raw = torch.zeros(7 * spec.page_size_bytes, dtype=torch.int8)
        pages = raw.view(spec.dtype).view(shape).view(7, 3, -1)
        assert pages.shape == fmt.allocate_pages(7, 3).shape


def test_a_layer_answers_with_pages_of_its_backend(monkeypatch) -> None:
    plain = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)
    monkeypatch.setattr(pages, "OLDER_PAGES", True)
    fine_pages = TurboQuantBackend.variant(load_settings(), True)
    for kind, slot in ((TurboQuantBackend, 132), (fine_pages, 196)):
        layer = SimpleNamespace(attn_backend=kind, get_kv_cache_spec=lambda config: plain)
        older_pages.answer_with_pages(layer)
        spec = layer.get_kv_cache_spec(None)
        assert spec.page_size_bytes == 16 * 2 * slot
        assert kind.customize_spec(spec) is spec
    layer = SimpleNamespace(attn_backend=kind, get_kv_cache_spec=lambda config: None)
    older_pages.answer_with_pages(layer)
    assert layer.get_kv_cache_spec(None) is None


def test_this_version_needs_it_or_not() -> None:
    import vllm

    assert vllm.__version__.startswith("0.26") == older_pages.OLDER_PAGES
