"""Presets as values of ``--kv-cache-dtype``; vLLM before 0.33 is made to take them as 0.33 does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm
from packaging.version import Version
from tq_core import TQError
from tq_kernels import KVFormat
from tq_kernels.presets import PRESETS
from tq_vllm.dtypes import PageDtype, dtype_names, register_dtypes
from tq_vllm.older_pages import OLDER_PAGES
from tq_vllm.settings import settings_of

LENGTHS, NEW = (150, 37), 16


@pytest.fixture
def registered(monkeypatch) -> dict[str, PageDtype]:
    """Names that vLLM got, with what it knows of them."""
    from tq_vllm.pages import TurboQuantPages
    from vllm.config import cache
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils import torch_utils
    from vllm.v1.attention import selector

    if hasattr(cache, "register_kv_cache_dtype"):
        register_dtypes()
        return cache._KV_CACHE_DTYPE_HANDLERS
    names: dict[str, PageDtype] = {}

    def register(name: str):
        def enter(make) -> None:
            assert name not in names
            names[name] = make()
            monkeypatch.setitem(
                torch_utils.STR_DTYPE_TO_TORCH_DTYPE, name, names[name].torch_dtype()
            )

        return enter

    monkeypatch.setattr(cache, "register_kv_cache_dtype", register, raising=False)
    monkeypatch.setattr(cache, "is_known_kv_cache_dtype", names.__contains__, raising=False)
    known = selector.get_args(cache.CacheDType)
    monkeypatch.setattr(selector, "get_args", lambda _: (*known, *names))
    create = EngineArgs.create_engine_config

    def create_with_any_dtype(self, *arguments, **options):
        asked, self.kv_cache_dtype = self.kv_cache_dtype, "auto"
        config = create(self, *arguments, **options)
        config.cache_config.cache_dtype = asked
        return config

    monkeypatch.setattr(EngineArgs, "create_engine_config", create_with_any_dtype)
    register_dtypes()
    dtypes = [*TurboQuantPages.supported_kv_cache_dtypes, *dtype_names()]
    monkeypatch.setattr(TurboQuantPages, "supported_kv_cache_dtypes", dtypes)
    return names


def test_names_are_those_of_the_presets(registered) -> None:
    register_dtypes()  # as plugins may be loaded more than once
    assert set(registered) == set(PRESETS)
    known = {(dtype.torch_dtype(), dtype.quant_mode().name) for dtype in registered.values()}
    assert known == {(torch.uint8, "NONE")}


def test_names_are_offered_where_vllm_takes_them() -> None:
    new = Version(vllm.__version__) >= Version("0.33")
    assert dtype_names() == (tuple(PRESETS) if new else ())
    register_dtypes()  # does nothing elsewhere


def config(name: str, *skipped: str) -> SimpleNamespace:
    return SimpleNamespace(cache_dtype=name, kv_cache_dtype_skip_layers=list(skipped))


def test_settings(monkeypatch) -> None:
    assert settings_of(config("auto", "0")).skip_layers == "none"  # of vLLM's own dtypes
    settings = settings_of(config("tq3"))
    assert (settings.preset, settings.key_bits, settings.value_bits) == ("tq3", 3, 3)
    assert (settings.skip_layers, settings.fine_layer_names) == ("none", "0,1,-2,-1")
    assert not settings_of(config("tq4")).singles_out_layers
    monkeypatch.setenv("TQ_SKIP_LAYERS", "3")
    settings = settings_of(config("tq4", "0", "sliding_window"))
    assert (settings.skip_layers, settings.singles_out_layers) == ("3,0,sliding_window", True)
    with pytest.raises(TQError, match="--kv-cache-dtype-skip-layers: 'first' names no layers"):
        settings_of(config("tq4", "first"))
    monkeypatch.setenv("TQ_PRESET", "tq4")
    assert settings_of(config("tq4")).preset == "tq4"
    with pytest.raises(TQError, match="--kv-cache-dtype tq3 and TQ_PRESET=tq4 differ"):
        settings_of(config("tq3"))


@pytest.mark.skipif(OLDER_PAGES, reason="vLLM 0.26 has other specifications than 0.33")
def test_an_engine_takes_its_pages_from_the_name(
    start, reference, decide, tiny, registered, caplog_vllm
) -> None:
    fine = dict.fromkeys((0, 1, 4, 5), KVFormat(128, 8, 4))
    generate = reference(tiny, KVFormat(128, 3, 3), kept=[2], formats=fine)
    prompts, answers = decide(generate, LENGTHS, NEW)
    options = {"kv_cache_dtype": "tq3", "kv_cache_dtype_skip_layers": ["2"], "block_size": 32}
    with start(tiny, {"TQ_PREFILL": "stored"}, **options) as engine:
        slots = [layer.kv_cache.shape[-1] for layer in engine.layers.values()]
        kinds = [type(layer.impl).__name__ for layer in engine.layers.values()]
        assert slots[:2] + slots[3:] == [196, 196, 100, 196, 196]
        assert [kind == "TurboQuantImpl" for kind in kinds] == [n != 2 for n in range(6)]
        assert engine.tokens(prompts, NEW) == [answer.tokens for answer in answers]
    (line,) = {r.getMessage() for r in caplog_vllm.records if "TurboQuant KV" in r.getMessage()}
    assert "keys 3 bits, values 3 bits" in line and "5 of 6 layers" in line
