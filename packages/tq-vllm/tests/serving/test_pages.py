"""Bytes of pages of models whose layers differ, by vLLM's own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
import vllm
from packaging.version import Version
from tq_vllm.older_pages import OLDER_PAGES

pytestmark = pytest.mark.skipif(OLDER_PAGES, reason="vLLM 0.26 knows one layout only")
PAGE, HEADS, DIM, WINDOW = 16, 4, 128, 1024
BLOCKS = 1000


@pytest.fixture
def vllm_config(tiny):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(tiny), dtype="float32", max_model_len=256).create_engine_config()


@dataclass(frozen=True)
class Layers:
    """Layers by kind: how many of each, and their bits of keys and values."""

    full: int
    sliding: int = 0
    states: int = 0
    sliding_at_16_bits: bool = False
    fine: int = 0  # of the full ones

    def specs(self):
        """Specifications by name, as the layers of a worker report them."""
        from tq_vllm.backend import TurboQuantBackend
        from tq_vllm.settings import load_settings
        from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

        common = {
            "block_size": PAGE,
            "num_kv_heads": HEADS,
            "head_size": DIM,
            "dtype": torch.bfloat16,
        }
        found = {}
        for n in range(self.full):
            backend = TurboQuantBackend.variant(load_settings(), n < self.fine)
            found[f"full.{n}"] = backend.customize_spec(FullAttentionSpec(**common))
        for n in range(self.sliding):
            spec = SlidingWindowSpec(**common, sliding_window=WINDOW)
            if not self.sliding_at_16_bits:
                spec = TurboQuantBackend.customize_spec(spec)
            found[f"sliding.{n}"] = spec
        for n in range(self.states):
            found[f"state.{n}"] = MambaSpec(
                block_size=4096, shapes=((7, 1000),), dtypes=(torch.bfloat16,)
            )
        return found


def planning_of_vllm():
    """The module that plans caches."""
    new = Version(vllm.__version__) >= Version("0.33")
    return import_module(f"vllm.v1.core.kv_cache_{'planning' if new else 'utils'}")


def resolved(vllm_config, layers, backends):
    """The configuration of the cache that vLLM makes of the layers."""
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )

    specs = layers.specs()
    names = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    vllm_config.cache_config.kv_cache_layout = None
    resolve_kv_cache_layout(vllm_config, [names], specs.values())
    planning = planning_of_vllm()
    groups = planning.get_kv_cache_groups(vllm_config, specs)
    return planning.get_kv_cache_config_from_groups(vllm_config, groups, BLOCKS * 2**20)


def parts(group):
    """Bytes of a block that a group uses, and bytes of them that its layers' pages hold."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = group.kv_cache_spec
    specs = (
        list(spec.kv_cache_specs.values())
        if isinstance(spec, UniformTypeKVCacheSpecs)
        else [spec] * len(group.layer_names)
    )
    return (
        sum(s.page_size_bytes for s in specs),
        sum(replace(s, page_size_padded=None).page_size_bytes for s in specs),
    )


class AnyLayout:
    """A backend as vLLM's FlashAttention: it declares no layouts."""

    @classmethod
    def supported_kv_cache_layouts(cls):
        return None


CASES = {
    "sliding-at-16-bits": (Layers(10, 50, sliding_at_16_bits=True), {"TQ_SKIP_LAYERS": "sliding"}),
    "fine-full-layers": (Layers(10, 10, fine=4), {"TQ_FINE_LAYERS": "0-3"}),
    "states-and-fine-layers": (Layers(6, states=18, fine=2), {"TQ_FINE_LAYERS": "0,1"}),
}


@pytest.mark.parametrize(("layers", "settings"), CASES.values(), ids=CASES)
def test_pages_of_different_sizes_are_packed_not_padded(
    vllm_config, monkeypatch, layers, settings
) -> None:
    from tq_vllm.backend import TurboQuantBackend
    from tq_vllm.settings import load_settings

    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    backends = [TurboQuantBackend, TurboQuantBackend.variant(load_settings(), True), AnyLayout]
    config = resolved(vllm_config, layers, backends)
    assert vllm_config.cache_config.kv_cache_layout == "BLHNC"
    block = BLOCKS * 2**20 // config.num_blocks
    used = [parts(group) for group in config.kv_cache_groups]
    assert all(own == page for page, own in used)  # no page has bytes that hold nothing
    # The layers that keep all tokens set the size of a block and fill it.
    (full,) = (
        page
        for (page, _), group in zip(used, config.kv_cache_groups, strict=True)
        if group.layer_names[0].startswith("full")
    )
    slots = layers.fine * 196 + (layers.full - layers.fine) * 132
    assert full // (PAGE * HEADS) == slots
    if layers.sliding_at_16_bits and Version(vllm.__version__) < Version("0.30"):
        full = max(page for page, _ in used)  # vLLM 0.29 fills blocks with full layers instead
    assert block // (PAGE * HEADS) == full // (PAGE * HEADS)
    if full == slots * PAGE * HEADS:  # vLLM fills blocks with windows and states
        assert all(page > block / 2 for page, _ in used)


def test_without_settings_for_layers_the_layers_are_outermost(vllm_config) -> None:
    from tq_vllm.backend import TurboQuantBackend

    config = resolved(vllm_config, Layers(12, 12), [TurboQuantBackend, AnyLayout])
    assert vllm_config.cache_config.kv_cache_layout == "LBHNC"
    assert {parts(group) for group in config.kv_cache_groups} == {(12 * PAGE * HEADS * 132,) * 2}


def test_a_backend_with_another_layout_pads_and_the_log_says_so(
    vllm_config, monkeypatch, caplog_vllm
) -> None:
    """As vLLM's attention for CPUs, which reads blocks of one layer only."""
    from tq_vllm.backend import TurboQuantBackend
    from tq_vllm.report import warn_of_padding
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    monkeypatch.setenv("TQ_SKIP_LAYERS", "sliding")
    layers = Layers(10, 10, sliding_at_16_bits=True)
    config = resolved(vllm_config, layers, [TurboQuantBackend, CPUAttentionBackend])
    (spec,) = {
        group.kv_cache_spec
        for group in config.kv_cache_groups
        if group.layer_names[0].startswith("full")
    }
    assert spec.page_size_bytes == PAGE * HEADS * 512
    warn_of_padding(spec)
    (line,) = {r.getMessage() for r in caplog_vllm.records if "pads pages" in r.getMessage()}
    assert str(PAGE * HEADS * 132) in line and str(PAGE * HEADS * 512) in line
