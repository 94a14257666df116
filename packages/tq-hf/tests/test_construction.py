"""What cannot work is refused when the cache is built, or at the update that shows it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.attention import turboquant_attention
from transformers import DeepseekV3Config, LlamaConfig, T5Config

CONFIG = LlamaConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=64
)
METRICS = torch.eye(64).repeat(2, 1, 1), torch.eye(64).repeat(2, 1, 1)
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG.to_dict(), **changes})


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (T5Config(), {}, "encoder-decoder"),
        (DeepseekV3Config(), {}, "latent attention"),
        (llama(head_dim=72), {}, "head_dim=72.*multiple of 16"),
        (llama(head_dim=320), {}, "head_dim=320.*16 to 256"),
        (llama(head_dim=8), {}, "head_dim=8"),
        ("llama", {}, "pass model.config"),
        (None, {}, "pass model.config"),
        (CONFIG, {"k_bits": 5}, "5"),
        (CONFIG, {"v_bits": 1}, "1"),
        (CONFIG, {"k_bits": 4.0}, "needs an int"),
        (CONFIG, {"sink_tokens": -1}, "sink_tokens=-1"),
        (CONFIG, {"window_tokens": 1.5}, "window_tokens=1.5"),
        (CONFIG, {"window_tokens": True}, "window_tokens=True"),
        (CONFIG, {"skip_layers": (3,)}, "skip_layers has 3"),
        (CONFIG, {"skip_layers": (-4,)}, "skip_layers has -4"),
        (CONFIG, {"skip_layers": (0, 1, 2)}, "no layer left"),
        (CONFIG, {"layer_bits": {3: (4, 4)}}, "layer 3: the model has layers 0 to 2"),
        (CONFIG, {"layer_bits": {"1": (4, 4)}}, "layer '1'"),
        (CONFIG, {"layer_bits": {True: (4, 4)}}, "layer True"),
        (CONFIG, {"layer_bits": {2: (4, 4), -1: (3, 3)}}, "layer 2 twice"),
        (CONFIG, {"layer_bits": {1: (5, 4)}}, r"layer_bits\[1\]=\(5, 4\): needs"),
        (CONFIG, {"layer_bits": {1: (16, 4)}}, "keys and values together"),
        (CONFIG, {"layer_bits": {1: 4}}, "needs a pair"),
        (CONFIG, {"layer_bits": {1: (4.0, 4)}}, "needs a pair"),
        (CONFIG, {"layer_bits": {1: (4, 4, 4)}}, "needs a pair"),
        (CONFIG, {"layer_bits": [(4, 4)] * 3}, "needs a mapping"),
        (CONFIG, {"layer_bits": {1: (4, 4)}, "skip_layers": (-2,)}, "layer 1, which is not"),
        (CONFIG, {"layer_bits": {0: (16, 16), 2: (16, 16)}, "skip_layers": (1,)}, "no layer left"),
        (CONFIG, {"layer_bits": {0: (3, 3)}, "k_bits": 5}, "5"),
        (CONFIG, {"rotation": "dct"}, "dct"),
        (CONFIG, {"search": "yes"}, "search='yes'"),
        (CONFIG, {"metrics": {}}, "search=True"),
        (CONFIG, {"search": True, "metrics": {3: METRICS}}, "metrics has layer 3"),
        (CONFIG, {"search": True, "metrics": {0: (METRICS[0], METRICS[0][0])}}, "of values: needs"),
        (CONFIG, {"search": True, "metrics": {0: (METRICS[0] / 0, METRICS[0])}}, "of keys: needs"),
        (CONFIG, {"scale": "max"}, "max"),
        (CONFIG, {"seed": -1}, "seed=-1"),
        (CONFIG, {"key_center": {0: torch.zeros(64)}}, r"key_center\[0\]"),
        (CONFIG, {"key_center": {7: torch.zeros(2, 64)}}, "layer 7"),
        (CONFIG, {"key_center": {0: torch.full((2, 64), torch.nan)}}, "not finite"),
    ],
)
def test_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TQError, match=message):
        TurboQuantCache(config, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to offload from")
def test_offloading_without_a_device_is_refused() -> None:
    with pytest.raises(TQError, match="CUDA"):
        TurboQuantCache(CONFIG, offloading=True)


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has such layers")
def test_recurrent_layers_are_refused_before_transformers_5() -> None:
    from transformers import BambaConfig, Lfm2Config, Qwen3NextConfig

    for config in (Qwen3NextConfig(), Lfm2Config(), BambaConfig()):
        with pytest.raises(TQError, match="install transformers 5"):
            TurboQuantCache(config)


def states(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (states(1, 2, 4, 64), states(1, 2, 4, 32), "same shape"),
        (states(2, 4, 64), states(2, 4, 64), "same shape"),
        (states(2, 2, 4, 64), states(2, 2, 4, 64), "batch, kv_heads, head_dim"),
        (states(1, 1, 4, 64), states(1, 1, 4, 64), "batch, kv_heads, head_dim"),
        (states(1, 2, 4, 96), states(1, 2, 4, 96), "batch, kv_heads, head_dim"),
        (states(1, 2, 4, 64).half(), states(1, 2, 4, 64).half(), "float16"),
        (states(1, 2, 4, 64), states(1, 2, 4, 64).half(), "for both"),
        (states(1, 2, 4, 64).long(), states(1, 2, 4, 64).long(), "float16, bfloat16"),
        (states(1, 2, 64, 64) * torch.nan, states(1, 2, 64, 64), "finite"),
        (states(1, 2, 64, 64) * 1e9, states(1, 2, 64, 64), "65504"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(keys: Any, values: Any, message: str) -> None:
    cache = TurboQuantCache(CONFIG)
    x = states(1, 2, 100, 64)
    cache.update(x, x, 0)
    before = [t.clone() for t in cache.layers[0].tensors()]
    with pytest.raises(TQError, match=message):
        cache.update(keys, values, 0)
    assert cache.get_seq_length() == 100
    after = list(cache.layers[0].tensors())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_first_update_that_fails_leaves_an_empty_layer() -> None:
    cache = TurboQuantCache(CONFIG)
    with pytest.raises(TQError, match="finite"):
        cache.update(states(1, 2, 64, 64) * torch.nan, states(1, 2, 64, 64), 0)
    x = states(3, 2, 64, 64)
    cache.update(x, x, 0)
    assert cache.layers[0].keys.shape == x.shape


def test_a_center_of_another_shape_is_refused() -> None:
    cache = TurboQuantCache(CONFIG, key_center={0: torch.zeros(3, 64)})
    with pytest.raises(TQError, match=r"kv_heads, head_dim"):
        cache.update(states(1, 2, 4, 64), states(1, 2, 4, 64), 0)


def test_gradients_are_refused() -> None:
    cache = TurboQuantCache(CONFIG)
    x = states(1, 2, 4, 64).requires_grad_()
    with torch.enable_grad(), pytest.raises(TQError, match="no_grad"):
        cache.update(x, x, 0)
    cache.update(x, x, 0)
    assert not cache.layers[0].keys.requires_grad


def test_attention_refuses_what_it_would_ignore() -> None:
    x = states(1, 2, 4, 64)
    module = torch.nn.Module()
    for options, message in (
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "output_attentions"),
        ({"head_mask": x}, "head_mask"),
    ):
        with pytest.raises(TQError, match=message):
            turboquant_attention(module, x, x, x, None, **options)


def test_a_crop_that_a_sliding_layer_cannot_follow_changes_nothing() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    cache = TurboQuantCache(config)
    x = states(1, 2, 40, 64)
    for layer in range(2):
        cache.update(x, x, layer)
    with pytest.raises(TQError, match="sliding-window layer 1"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]


@pytest.mark.skipif(not TRANSFORMERS_5, reason="4.57 takes lengths")
def test_a_length_is_no_number_to_remove() -> None:
    cache = TurboQuantCache(CONFIG)
    cache.update(states(1, 2, 40, 64), states(1, 2, 40, 64), 0)
    with pytest.raises(TQError, match="-30"):
        cache.crop(10)


def test_reading_and_writing_keys() -> None:
    cache = TurboQuantCache(CONFIG)
    assert cache.layers[0].keys is None
    with pytest.raises(AttributeError):
        cache.layers[0].keys = torch.zeros(1)


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, tq_hf; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_a_name_of_our_own_is_registered() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ours = {n for n, f in ALL_ATTENTION_FUNCTIONS.items() if f.__module__.startswith("tq_hf")}
    # tq_hf.verify registers its three when it is imported.
    assert ours - {"tq_rounded", "tq_layer_probe", "tq_query_probe"} == {"turboquant"}
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["turboquant"] is sdpa_mask


def test_offload_and_prefetch_move_everything() -> None:
    cache = TurboQuantCache(CONFIG, key_center={0: torch.randn(2, 64)})
    x = states(1, 2, 100, 64)
    cache.update(x, x, 0)
    layer = cache.layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {t.device.type for t in layer.tensors()} == {"meta"}
    cache = TurboQuantCache(CONFIG)
    cache.update(x, x, 0)
    layer, keys = cache.layers[0], cache.layers[0].keys
    assert layer.device.type == "cpu"
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, keys)
