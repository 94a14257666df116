"""What is registered, and what is refused with which reason."""

from __future__ import annotations

import sys

import pytest
import torch
import vllm
from packaging.version import Version
from tq_core import TQError
from tq_vllm import register
from tq_vllm.plugin import BACKEND


@pytest.fixture
def registry():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    names = AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM
    for name in names:
        name.clear_override()
    yield names
    for name in names:
        name.clear_override()


def test_installing_changes_nothing_unless_asked(registry, monkeypatch) -> None:
    cpu, custom = registry
    register()
    assert custom.get_path() == BACKEND  # what --attention-backend CUSTOM asks for
    assert not cpu.is_overridden()
    monkeypatch.setenv("TQ_PRESET", "tq4")
    monkeypatch.setenv("TQ_CPU", "0")
    register()
    assert not cpu.is_overridden()


def test_another_plugins_custom_backend_is_left_alone_unless_asked(registry, monkeypatch) -> None:
    from vllm.v1.attention.backends.registry import register_backend

    cpu, custom = registry
    register_backend(custom, "other.Backend")
    register()
    assert custom.get_path() == "other.Backend"
    monkeypatch.setenv("TQ_K_BITS", "4")
    register()
    assert custom.get_path() == cpu.get_path() == BACKEND


def test_asking_for_it_in_an_unsupported_version_tells_the_range(registry, monkeypatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    monkeypatch.setattr("tq_vllm.versions.FIRST", "0.99")
    monkeypatch.setattr("tq_vllm.versions.OLDER", "0.98")
    monkeypatch.delitem(sys.modules, BACKEND.rpartition(".")[0], raising=False)
    register()
    with pytest.raises(TQError, match=f"vllm {vllm.__version__}: .*>= 0.99, < 0.34"):
        resolve_obj_by_qualname(registry[1].get_path())  # as the selection of a backend does
    monkeypatch.setenv("TQ_PRESET", "tq4")
    with pytest.raises(TQError, match=">= 0.99"):
        register()


def test_wrong_settings_stop_the_start(registry, monkeypatch) -> None:
    monkeypatch.setenv("TQ_K_BITS", "5")
    with pytest.raises(TQError, match="TQ_K_BITS"):
        register()


def test_vllm_finds_the_entry_point() -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["turboquant"] is register


def reasons(**changes) -> list[str]:
    """Why the backend cannot be selected, by vLLM's own check."""
    from tq_vllm.backend import TurboQuantBackend
    from vllm.platforms.interface import DeviceCapability

    config = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }
    return TurboQuantBackend.validate_configuration(**(config | changes))


def test_selection() -> None:
    from vllm.platforms.interface import DeviceCapability

    assert reasons() == []
    assert reasons(head_size=80, has_sink=True, has_sliding_window=True, block_size=48) == []
    assert reasons(dtype=torch.float16, kv_cache_dtype="bfloat16", use_kv_connector=True) == []
    assert reasons(use_mm_prefix=True) == []
    refused = {
        "MLA not supported": {"use_mla": True},
        "head_size not supported": {"head_size": 72},
        "dtype not supported": {"dtype": torch.float64},
        "kv_cache_dtype not supported": {"kv_cache_dtype": "fp8"},
        "block_size not supported": {"block_size": 8},
        "attention type encoder_only not supported": {"attn_type": "encoder_only"},
        "sparse not supported": {"use_sparse": True},
        "non-causal attention not supported": {"use_non_causal": True},
        "compute capability not supported": {"device_capability": DeviceCapability(7, 5)},
    }
    if Version(vllm.__version__) >= Version("0.30"):  # 0.29 does not ask
        refused["DCP not supported"] = {"use_dcp": True}
    for reason, change in refused.items():
        assert reasons(**change) == [reason]
    assert reasons(head_size=512) == reasons(head_size=72)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alibi_slopes": [0.5, 0.25]}, "alibi slopes"),
        ({"attn_type": "encoder_decoder"}, "attention of type 'encoder_decoder'"),
        ({"head_size": 72}, "head_dim 72, no multiple of 16"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"use_irope": True}, "arguments use_irope"),
    ],
)
def test_a_layer_that_cannot_be_served_is_refused(tiny, arguments, message) -> None:
    """Also where vLLM does not ask, as on its CPU platform."""
    from tq_vllm.impl import TurboQuantImpl
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(tiny), max_model_len=64).create_engine_config()
    given = {"num_heads": 2, "head_size": 64, "scale": 0.125, "num_kv_heads": 2} | arguments
    with set_current_vllm_config(config), pytest.raises(TQError, match=message):
        TurboQuantImpl(**given)


def test_contexts_split_over_devices_are_refused(tiny, monkeypatch) -> None:
    from tq_vllm.impl import TurboQuantImpl
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(tiny), max_model_len=64).create_engine_config()
    monkeypatch.setattr(config.parallel_config, "decode_context_parallel_size", 2)
    with (
        set_current_vllm_config(config),
        pytest.raises(TQError, match="decode context parallelism"),
    ):
        TurboQuantImpl(num_heads=2, head_size=64, scale=0.125, num_kv_heads=2)


def test_layers_take_images_that_windows_hide_in_part(tiny) -> None:
    """As Gemma 4 asks for."""
    from tq_vllm.impl import TurboQuantImpl
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(tiny), max_model_len=64).create_engine_config()
    with set_current_vllm_config(config):
        impl = TurboQuantImpl(2, 64, 0.125, 2, mm_prefix_clamp_sliding_window=True)
    assert impl.arguments["mm_prefix_clamp_sliding_window"] is True


def test_specifications_of_other_layers_are_refused() -> None:
    from tq_vllm.backend import TurboQuantBackend
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    common = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    for spec in (FullAttentionSpec(**common), SlidingWindowSpec(**common, sliding_window=8)):
        page = TurboQuantBackend.customize_spec(spec)
        assert page.page_size_bytes == 32 * 2 * (64 + 4)
        assert TurboQuantBackend.customize_spec(page) is page
        assert type(page) is type(spec)
    chunked = ChunkedLocalAttentionSpec(**common, attention_chunk_size=64)
    for spec in (MLAAttentionSpec(**common), chunked):
        with pytest.raises(TQError, match=type(spec).__name__):
            TurboQuantBackend.customize_spec(spec)
    with pytest.raises(TQError, match="dimension 64 and values of dimension 32"):
        TurboQuantBackend.customize_spec(FullAttentionSpec(**common, head_size_v=32))


def test_an_engine_with_other_settings_refuses_to_start(start, tiny) -> None:
    with (
        pytest.raises(TQError, match="layers 0 to 5"),
        start(tiny, {"TQ_PRESET": "tq4", "TQ_SKIP_LAYERS": "6"}),
    ):
        pass


def test_the_log_and_the_plan_tell_the_bytes_that_are_allocated(start, tiny, caplog_vllm) -> None:
    from tq_vllm.capacity import ModelShape, capacity, formats, read_config
    from tq_vllm.report import cache_bytes

    with start(
        tiny, {"TQ_PRESET": "tq3", "TQ_SKIP_LAYERS": "2"}, block_size=32, dtype="bfloat16"
    ) as engine:
        sizes = cache_bytes(engine.config)
        pages = engine.config.cache_config.num_gpu_blocks
        assert sizes.token == (100 + 4 * 196 + 512) * 2
        assert pages == (8 << 20) // int(32 * sizes.token)
        assert (sizes.slots, sizes.layers, sizes.compressed) == ((100, 196), 6, 5)
    shape = ModelShape.from_config(read_config(str(tiny)))
    fmt = formats(3, 3, skip_layers="2", fine_layers="0,1,-2,-1")[-1]
    planned = capacity(shape, fmt, 8 << 20, 1000)
    assert planned.token_bytes == sizes.token
    assert planned.longest // 32 == min(pages, shape.longest // 32)
    assert planned.ratio == sizes.ratio
    (line,) = {r.getMessage() for r in caplog_vllm.records if "TurboQuant KV" in r.getMessage()}
    assert "keys 3 bits, values 3 bits" in line and "5 of 6 layers" in line
    assert f"{sizes.token:.0f} bytes a token against {512 * 2 * 6}" in line
    assert f"({512 * 2 * 6 / sizes.token:.2f}x smaller)" in line
    assert "first 4 and last 32 tokens" in line and "are compressed too" in line
