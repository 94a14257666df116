"""Every operation of the cache equals that of a 16-bit cache with the old tokens rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from tq_hf import TurboQuantCache
from tq_hf.argument import cache_argument
from tq_hf.models import held_out_text
from tq_hf.stand_in import StandIn
from tq_hf.testing import feed, reference_cache
from transformers import DynamicCache

EXACT = {"atol": 1e-9, "rtol": 1e-7}
#: A single token of codes is decoded by a float32 matrix product of another shape.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
BITS = [(4, 4), (4, 3), (3, 3), (2, 2), (8, 4)]


def text_ids(trained: Any, tokens: int, start: int = 0, batch: int = 1) -> Tensor:
    """Held-out tokens [batch, tokens]."""
    ids = trained[1].encode(held_out_text("click"), add_special_tokens=False)
    return torch.tensor(ids[start : start + batch * tokens]).view(batch, tokens)


def pair(model: Any, **options: Any) -> tuple[TurboQuantCache, Any]:
    """A cache and its reference."""
    cache = TurboQuantCache(model.config, **options)
    return cache, reference_cache(cache)


def check_equal(
    model: Any, ids: Tensor, caches: Any, sizes: Any, mask: Any = None, close: Any = EXACT
) -> Tensor:
    """Feed both caches, compare the logits, and return them."""
    sizes = list(sizes)
    ours, theirs = (feed(model, ids, cache, sizes, mask) for cache in caches)
    if mask is not None:
        seen = mask[:, -ids.shape[1] :].bool()
        ours, theirs = ours[seen], theirs[seen]
    torch.testing.assert_close(ours, theirs, **close)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    return ours


def check_held(cache: TurboQuantCache, reference: Any, close: Any = EXACT) -> None:
    """Both caches hold the same numbers."""
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **close)
        torch.testing.assert_close(ours.values, theirs.values, **close)


@pytest.mark.parametrize(("k_bits", "v_bits"), BITS)
def test_logits_of_prefill_in_chunks_and_of_steps(
    model: Any, trained: Any, k_bits: int, v_bits: int
) -> None:
    caches = pair(model, k_bits=k_bits, v_bits=v_bits)
    ids = text_ids(trained, 176)
    ours = check_equal(model, ids, caches, [100, 1, 1, 37, 5, *[1] * 17, 15])
    check_held(*caches)
    exact = feed(model, ids, DynamicCache(), [176])
    assert (ours - exact).abs().max() > 1e-3  # the codes were read


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (4, 0), (0, 16), (5, 7), (200, 0), (0, 200)])
def test_any_sinks_and_window(trained: Any, sinks: int, window: int) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    caches = pair(model, sink_tokens=sinks, window_tokens=window)
    check_equal(model, text_ids(trained, 120), caches, [3, 50, 1, 1, 45, *[2] * 10])
    check_held(*caches)


def test_a_prompt_is_attended_to_as_it_came(model: Any, trained: Any) -> None:
    ids = text_ids(trained, 150)
    cache = TurboQuantCache(model.config, k_bits=2, v_bits=2)
    ours, exact = (feed(model, ids, c, [150]) for c in (cache, DynamicCache()))
    assert torch.equal(ours, exact)


def test_stand_ins_only_where_attention_takes_them(trained: Any) -> None:
    model = trained[0]
    x = torch.randn(1, 2, 64, 128)
    for name, expected in (("sdpa", True), ("turboquant", True), ("eager", False)):
        model.set_attn_implementation(name)
        cache = TurboQuantCache(model.config)
        keys, _ = cache.update(x, x, 0)
        assert not isinstance(keys, StandIn)  # nothing is compressed yet
        keys, _ = cache.update(x[:, :, :1], x[:, :, :1], 0)
        assert isinstance(keys, StandIn) is expected


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 4, "do_sample": False},
    "return-two": {"num_return_sequences": 2, "do_sample": True},
}


def generate(model: Any, ids: Tensor, cache: Any, tokens: int = 40, **options: Any) -> Tensor:
    torch.manual_seed(0)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids,
        attention_mask=mask,
        **cache_argument(model, cache),
        max_new_tokens=tokens,
        pad_token_id=0,
        **options,
    )


@pytest.mark.parametrize("how", GENERATE)
def test_generation(model: Any, trained: Any, how: str) -> None:
    ours, theirs = pair(model, k_bits=3, v_bits=3, window_tokens=16)
    ids = text_ids(trained, 90)
    options = GENERATE[how]
    assert torch.equal(
        generate(model, ids, ours, **options), generate(model, ids, theirs, **options)
    )


def test_an_assistant_model_generates_as_greedy(trained: Any) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    ours, theirs = pair(model, window_tokens=16)
    ids = text_ids(trained, 90)
    options = {"assistant_model": model, "do_sample": False}
    assert torch.equal(
        generate(model, ids, ours, **options), generate(model, ids, theirs, **options)
    )


def padded(trained: Any) -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths, padded on the left, and their mask."""
    lengths = [120, 61, 9]
    ids = torch.zeros(3, 120, dtype=torch.long)
    mask = torch.zeros(3, 120, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, -n:] = text_ids(trained, n, start=300 * row)[0]
        mask[row, -n:] = 1
    return ids, mask


def test_left_padding(model: Any, trained: Any) -> None:
    ids, mask = padded(trained)
    tokens = text_ids(trained, 40, start=2000, batch=3)
    whole = torch.cat((ids, tokens), dim=1)
    mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
    caches = pair(model, window_tokens=8)
    check_equal(model, whole[:, :80], caches, [80], mask[:, :80])
    check_equal(model, whole[:, 80:120], caches, [40], mask[:, :120])
    check_equal(model, whole[:, 120:], caches, [25, *[1] * 15], mask)


@pytest.mark.parametrize("how", ["greedy", "beam"])
def test_generation_with_left_padding(model: Any, trained: Any, how: str) -> None:
    ids, mask = padded(trained)
    ours, theirs = pair(model, window_tokens=8)
    options = {"attention_mask": mask, "tokens": 24, **GENERATE[how]}
    assert torch.equal(
        generate(model, ids, ours, **options), generate(model, ids, theirs, **options)
    )


def crop_to(caches: Any, keep: int) -> None:
    for cache in caches:
        cache.crop(keep - cache.get_seq_length())


@pytest.mark.parametrize("keep", [129, 110, 64, 5, 4, 3, 1])
def test_crop(model: Any, trained: Any, keep: int) -> None:
    caches = pair(model)
    ids = text_ids(trained, 170)
    check_equal(model, ids[:, :130], caches, [100, *[3] * 10])
    crop_to(caches, keep)
    assert caches[0].get_seq_length() == keep
    close = FLOAT32 if keep == 5 else EXACT  # behind 4 sinks
    check_held(*caches, close)
    check_equal(model, ids[:, keep:], caches, [10, *[6] * 5, 130 - keep], close=close)
    check_held(*caches, close)


def test_crop_to_nothing_and_of_nothing(trained: Any) -> None:
    model = trained[0]
    cache = TurboQuantCache(model.config)
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    feed(model, text_ids(trained, 100), cache, [100])
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    caches = (cache, reference_cache(TurboQuantCache(model.config)))
    check_equal(model, text_ids(trained, 90), caches, [80, *[1] * 10])


def test_batch_operations(model: Any, trained: Any) -> None:
    caches = pair(model, window_tokens=8)
    ids = text_ids(trained, 90, batch=2)
    check_equal(model, ids, caches, [80, *[1] * 10])
    for cache in caches:
        cache.batch_repeat_interleave(3)
    more = text_ids(trained, 20, start=500, batch=6)
    check_equal(model, more, caches, [3, *[1] * 17])
    for cache in caches:
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
    more = text_ids(trained, 20, start=900, batch=3)
    check_equal(model, more, caches, [3, *[1] * 17])
    for cache in caches:
        cache.reorder_cache(torch.tensor([2, 2, 0]))
    check_equal(model, more, caches, [3, *[1] * 17])
    for cache in caches:
        cache.batch_select_indices(torch.tensor([True, False, True]))
    check_equal(model, more[:2], caches, [3, *[1] * 17])
    check_held(*caches)


def test_reset_and_reuse_for_another_batch(model: Any, trained: Any) -> None:
    caches = pair(model)
    check_equal(model, text_ids(trained, 90, batch=2), caches, [90])
    for cache in caches:
        cache.reset()
    assert caches[0].get_seq_length() == 0
    assert caches[0].memory_usage().held_bytes == 0
    check_equal(model, text_ids(trained, 100, start=700), caches, [80, *[1] * 20])


def test_copies_are_independent(model: Any, trained: Any) -> None:
    caches = pair(model)
    ids = text_ids(trained, 160)
    check_equal(model, ids[:, :100], caches, [100])
    first = copy.deepcopy(caches[0]), copy.deepcopy(caches[1])
    check_equal(model, text_ids(trained, 50, start=900), first, [20, *[1] * 30])
    check_equal(model, ids[:, 100:], caches, [20, *[1] * 40])
    check_held(*caches)
    check_held(*first)


def test_a_copy_follows_the_model_s_attention(trained: Any) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    cache = copy.deepcopy(TurboQuantCache(model.config))
    model.set_attn_implementation("eager")
    assert not cache.layers[0].options.reads_codes


def test_several_turns(model: Any, trained: Any) -> None:
    ours, theirs = pair(model, window_tokens=16)
    ids = text_ids(trained, 70)
    for turn in range(3):
        a = generate(model, ids, ours, tokens=15, do_sample=False)
        b = generate(model, ids, theirs, tokens=15, do_sample=False)
        assert torch.equal(a, b)
        ids = torch.cat((a, text_ids(trained, 12, start=1000 + 50 * turn)), dim=1)
    assert ours.get_seq_length() == theirs.get_seq_length() > 130


def test_a_key_center(model: Any, trained: Any) -> None:
    center = {1: torch.randn(2, 128)}
    caches = pair(model, key_center=center)
    check_equal(model, text_ids(trained, 130), caches, [90, *[1] * 40])
    check_held(*caches)


def test_skipped_layers_are_exact(trained: Any) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    caches = pair(model, skip_layers=(-1,))
    check_equal(model, text_ids(trained, 100), caches, [80, *[1] * 20])
    for index, expected in enumerate([True, False]):
        assert hasattr(caches[0].layers[index], "history") is expected


def test_bits_by_layer(model: Any, trained: Any) -> None:
    caches = pair(model, layer_bits={0: (8, 2), -1: (3, 4)})
    check_equal(model, text_ids(trained, 130), caches, [90, *[1] * 40])
    check_held(*caches)
    formats = [(x.fmt.k_bits, x.fmt.v_bits) for x in caches[0].layers]
    assert formats == [(8, 2), (3, 4)]
    coded = sum(x.history.tokens for x in caches[0].layers) // 2
    assert caches[0].memory_usage().code_bytes == 2 * coded * (164 + 116)


def test_a_layer_of_16_bits_is_a_skipped_layer(trained: Any) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    center = {0: torch.randn(2, 128), 1: torch.randn(2, 128)}
    kinds = [
        [type(layer) for layer in TurboQuantCache(model.config, key_center=center, **given).layers]
        for given in ({"layer_bits": {-1: (16, 16)}}, {"skip_layers": (1,)})
    ]
    assert kinds[0] == kinds[1]
    assert kinds[0][0] is not kinds[0][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sdpa", "eager", "turboquant"])
def test_other_types(dtype: torch.dtype, name: str) -> None:
    from tq_hf.models import load_model

    model, tokenizer = load_model("tiny", dtype=dtype, attn_implementation=name)
    ids = text_ids((model, tokenizer), 120)
    caches = pair(model)
    ours, theirs = (feed(model, ids, c, [90, *[2] * 15]) for c in caches)
    assert ours.dtype == dtype
    # The reference rounds the decoded tokens to this type; both lie near the exact numbers.
    tolerance = {torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    assert (ours - theirs).abs().max() < tolerance


def test_update_under_compile(trained: Any) -> None:
    """The update leaves the graph and returns plain tensors there."""
    model = trained[0]
    model.set_attn_implementation("sdpa")
    caches = [TurboQuantCache(model.config, window_tokens=0) for _ in range(2)]
    x = torch.randn(1, 2, 100, 128, dtype=torch.float64)

    def step(cache: Any, states: Tensor) -> Tensor:
        keys, values = cache.update(states, states, 0)
        return keys * 2 + values

    compiled = torch.compile(step, backend="eager", dynamic=True)
    for start, stop in ((0, 64), (64, 65), (65, 100)):
        part = x[:, :, start:stop]
        assert torch.equal(compiled(caches[0], part), step(caches[1], part))
    strict = torch.compile(step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="disable"):
        strict(caches[0], x)


def test_modes_may_change(trained: Any) -> None:
    model = trained[0]
    model.set_attn_implementation("sdpa")
    ids = text_ids(trained, 150, batch=2)
    cache, same = TurboQuantCache(model.config), TurboQuantCache(model.config)
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode]
    operations = [
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.crop(-5 if c.get_seq_length() else 0),
        lambda c: None,
    ]
    ours, theirs = [], []
    for i, (mode, operation) in enumerate(zip(modes, operations, strict=True)):
        part = ids[:, 50 * i : 50 * i + 50]
        with mode():
            ours.append(feed(model, part, cache, [40, *[1] * 10]).clone())
            operation(cache)
        theirs.append(feed(model, part, same, [40, *[1] * 10]))
        operation(same)
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


def test_autocast_does_not_reach_the_codes(single: Any) -> None:
    model = single[0]
    x = torch.randn(1, 2, 100, 128).bfloat16()
    ours, theirs = (TurboQuantCache(model.config, window_tokens=0) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        ours.update(x, x, 0)
        keys = ours.layers[0].keys
        again = ours.update(x, x, 0)
        ours_out = torch.nn.functional.scaled_dot_product_attention(x, *again)
    theirs.update(x, x, 0)
    assert torch.equal(keys, theirs.layers[0].keys)
    again = theirs.update(x, x, 0)
    theirs_out = torch.nn.functional.scaled_dot_product_attention(x, *again)
    assert torch.equal(ours_out, theirs_out)


def test_generate_prefills_in_chunks(model: Any, trained: Any) -> None:
    ids = text_ids(trained, 130)
    ours, theirs = pair(model, window_tokens=16)
    options = {"prefill_chunk_size": 48, "do_sample": False, "tokens": 20}
    assert torch.equal(
        generate(model, ids, ours, **options), generate(model, ids, theirs, **options)
    )
