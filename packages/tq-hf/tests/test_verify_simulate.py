"""Simulated rounding equals the cache; roundings of competitors do what their formats say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.testing import feed
from tq_hf.verify import roundings
from tq_hf.verify.roundings import turboquant
from tq_hf.verify.simulate import RoundedHistory, rounded, visible_codes
from tq_kernels import KVFormat


@pytest.fixture(scope="module")
def ids(trained: Any) -> torch.Tensor:
    text = "import os\n\n\ndef walk(path):\n    for name in os.listdir(path):\n" * 8
    return torch.tensor([[0, *trained[1].encode(text)[:87]]])


def exact(x: torch.Tensor, layer: int) -> torch.Tensor:
    return x


def simulated(model: Any, ids: torch.Tensor, history: RoundedHistory) -> torch.Tensor:
    with rounded(model, history):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "sinks", "window"), [(4, 4, 4, 32), (3, 2, 0, 0), (4, 3, 5, 3)]
)
def test_one_pass_equals_the_cache_fed_token_by_token(
    trained: Any, ids: torch.Tensor, k_bits: int, v_bits: int, sinks: int, window: int
) -> None:
    model, _ = trained
    model.set_attn_implementation("sdpa")
    ends = {"sink_tokens": sinks, "window_tokens": window}
    center = {i: torch.linspace(-1, 1, 256).reshape(2, 128) * (i + 1) for i in range(2)}
    cache = TurboQuantCache(model.config, k_bits, v_bits, key_center=center, **ends)
    want = feed(model, ids, cache, [1] * ids.shape[1])
    history = turboquant(KVFormat(128, k_bits, v_bits), centers=center, **ends)
    torch.testing.assert_close(simulated(model, ids, history), want, rtol=1e-5, atol=1e-5)


def test_nothing_rounded_is_the_model(trained: Any, ids: torch.Tensor) -> None:
    model, _ = trained
    model.set_attn_implementation("sdpa")
    want = model(input_ids=ids, use_cache=False).logits
    for ends in ({}, {"sink_tokens": 0, "window_tokens": 0, "block_tokens": 1}):
        got = simulated(model, ids, RoundedHistory(exact, exact, 512, **ends))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    skipped = RoundedHistory(lambda x, _: 0 * x, exact, 0, skip_layers=frozenset({0, 1}))
    torch.testing.assert_close(simulated(model, ids, skipped), want, rtol=1e-5, atol=1e-5)


def test_the_model_gets_its_attention_back(trained: Any, ids: torch.Tensor) -> None:
    model, _ = trained
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="stop"), rounded(model, RoundedHistory(exact, exact, 0)):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("tq_rounded")
    with pytest.raises(TQError, match="inside"):
        model(input_ids=ids, use_cache=False)
    model.set_attn_implementation("sdpa")


@given(st.integers(0, 300), st.integers(0, 8), st.integers(0, 64), st.sampled_from([1, 16, 32]))
def test_codes_seen_leave_the_window_whole(
    position: int, sinks: int, window: int, block: int
) -> None:
    history = RoundedHistory(exact, exact, 0, sinks, window, block)
    seen = visible_codes(position, history)
    assert seen % block == 0
    fresh = position + 1 - sinks - seen
    assert fresh >= min(window + 1, position + 1 - sinks)
    assert fresh <= max(window + block, position + 1 - sinks if seen == 0 else 0)
    assert visible_codes(torch.tensor([position]), history).item() == seen


x = torch.randn(2, 2, 64, 128, generator=torch.Generator().manual_seed(1)) * 3


@given(st.integers(2, 8), st.floats(0.01, 100))
@settings(max_examples=20)
def test_uniform_levels_are_within_half_a_step(bits: int, size: float) -> None:
    y = x * size
    step = (y.amax(-1) - y.amin(-1)) / (2**bits - 1)
    error = (roundings.uniform(y, bits) - y).abs().amax(-1)
    # Scale and zero point are fp16 numbers.
    assert bool((error <= 0.5 * step + y.abs().amax(-1) * 2**-9).all())


@pytest.mark.parametrize(
    ("history", "slot_bytes", "k_error", "v_error"),
    [
        (roundings.integers(128, 4), 136, (0.005, 0.02), (0.005, 0.02)),
        (roundings.integers(128, 8), 264, (1e-5, 1e-4), (1e-5, 1e-4)),
        (roundings.fp8(128), 256, (3e-4, 1.5e-3), (3e-4, 1.5e-3)),
        (roundings.vllm_turboquant(128, "k8v4"), 196, (3e-4, 1.5e-3), (0.005, 0.02)),
        (roundings.vllm_turboquant(128, "4bit_nc"), 134, (0.008, 0.011), (0.005, 0.02)),
        (roundings.vllm_turboquant(128, "k3v4_nc"), 118, (0.03, 0.038), (0.005, 0.02)),
        (roundings.vllm_turboquant(128, "3bit_nc"), 102, (0.03, 0.038), (0.03, 0.08)),
        (roundings.kivi(128, 4), 160, (0.003, 0.02), (0.003, 0.02)),
        (roundings.kivi(128, 2), 96, (0.08, 0.4), (0.08, 0.4)),
        (turboquant(KVFormat(128, 4, 3)), 116, (0.0085, 0.0098), (0.032, 0.036)),
    ],
)
def test_size_and_error_of_each_format(
    history: RoundedHistory,
    slot_bytes: float,
    k_error: tuple[float, float],
    v_error: tuple[float, float],
) -> None:
    assert history.slot_bytes == slot_bytes
    for rounding, (low, high) in ((history.keys, k_error), (history.values, v_error)):
        restored = rounding(x, 0)
        assert restored.shape == x.shape
        assert low < float((restored - x).square().sum() / x.square().sum()) < high


def test_kivi_groups_keys_by_channel() -> None:
    y = x.clone()
    y[..., 7] *= 1000
    restored = roundings.kivi(128, 4).keys(y, 0)
    rest = [i for i in range(128) if i != 7]
    want = roundings.kivi(128, 4).keys(x, 0)
    assert torch.equal(restored[..., rest], want[..., rest])


def test_outlier_channels_have_more_bits() -> None:
    y = x.clone()
    y[..., :32] *= 10
    states = {0: (y.transpose(0, 1).flatten(1, 2), x.transpose(0, 1).flatten(1, 2))}
    history = roundings.outliers(states, 2.5)
    assert history.slot_bytes == 80
    error = (history.keys(y, 0) - y).square().mean(dim=(0, 1, 2)) / y.square().mean(dim=(0, 1, 2))
    assert float(error[:32].mean()) == pytest.approx(0.034, rel=0.15)
    assert float(error[32:].mean()) == pytest.approx(0.116, rel=0.15)


def test_centres_are_subtracted_and_added_back() -> None:
    shift = torch.full((2, 128), 500.0)
    plain = turboquant(KVFormat(128, 3, 3))
    centred = turboquant(KVFormat(128, 3, 3), centers={0: shift})
    want = plain.keys(x, 0)
    torch.testing.assert_close(centred.keys(x + shift[:, None], 0) - 500, want, atol=2e-3, rtol=0)
    own = turboquant(KVFormat(128, 3, 3), centers=64)
    error = (own.keys(x + 500, 0) - 500 - x).square().mean()
    assert float(error) < 0.05 * float(x.square().mean())


def test_own_seeds_change_the_codes_not_the_error() -> None:
    shared, own = (turboquant(KVFormat(128, 3, 3), own_seeds=flag) for flag in (False, True))
    assert not torch.equal(shared.keys(x, 0), own.keys(x, 0))
    assert not torch.equal(own.keys(x, 0), own.keys(x, 1))
    assert not torch.equal(own.keys(x, 0), own.values(x, 0))


def test_an_unknown_cache_type_of_vllm_is_an_error() -> None:
    with pytest.raises(TQError, match="3bit_nc"):
        roundings.vllm_turboquant(128, "2bit")
