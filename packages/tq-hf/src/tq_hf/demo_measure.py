"""What ``tq demo`` measures: generation, prediction of held-out text, and bytes held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tq_core import PageLayout

from tq_hf.argument import cache_argument

__all__ = [
    "FORMATS",
    "LLAMA_8B",
    "CacheResult",
    "ModelShape",
    "bytes_per_token",
    "cache_factories",
    "generate",
    "held_bytes",
    "measure",
    "predict",
]

CacheFactory = Callable[[], Any]
Progress = Callable[[str], None]

# Name of a cache -> bits of keys and values.
FORMATS: Mapping[str, tuple[int, int]] = {
    "16-bit": (16, 16),
    "K4V4": (4, 4),
    "K4V3": (4, 3),
    "K3V3": (3, 3),
}
BASELINE = "16-bit"


@dataclass(frozen=True)
class ModelShape:
    """The shape that determines the size of a cache.

    Attributes
    ----------
    layers, kv_heads, head_dim : int
        Attention layers, key-value heads of a layer, and their dimension.
    """

    layers: int
    kv_heads: int
    head_dim: int


LLAMA_8B = ModelShape(layers=32, kv_heads=8, head_dim=128)


@dataclass(frozen=True)
class CacheResult:
    """What one cache costs and what it does to the model.

    Attributes
    ----------
    name : str
        Name of the cache, a key of `FORMATS`.
    text : str
        Greedy continuation of the prompt.
    same_prefix : int
        Generated tokens before the first that differs from the 16-bit cache's.
    generated : int
        Tokens generated.
    agreement : float
        Share of held-out positions at which the most probable token is the 16-bit cache's.
    perplexity : float
        Of the held-out text, a token.
    predicted : int
        Held-out tokens predicted.
    bytes_per_token : int
        Bytes that one more token of history takes, in all layers.
    ratio : float
        The 16-bit cache's bytes a token over this one's.
    held_bytes : int
        Bytes of all tensors that the cache held after the held-out text.
    projection_bytes : int
        Bytes of the cache of a model shaped like Llama-3.1-8B at 131,072 tokens.
    """

    name: str
    text: str
    same_prefix: int
    generated: int
    agreement: float
    perplexity: float
    predicted: int
    bytes_per_token: int
    ratio: float
    held_bytes: int
    projection_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)


def bytes_per_token(shape: ModelShape, k_bits: int, v_bits: int) -> int:
    """Bytes that a token takes in all layers: codes and scales, or 16-bit numbers."""
    if (k_bits, v_bits) == (16, 16):
        slot = shape.head_dim * (k_bits + v_bits) // 8
    else:
        slot = PageLayout(shape.head_dim, k_bits, v_bits).slot_bytes
    return shape.layers * shape.kv_heads * slot


def cache_factories(config: Any) -> dict[str, CacheFactory]:
    """Return a factory of an empty cache for each of `FORMATS`."""
    from transformers import DynamicCache

    from tq_hf import TurboQuantCache

    def compressed(k_bits: int, v_bits: int) -> CacheFactory:
        return lambda: TurboQuantCache(config, k_bits=k_bits, v_bits=v_bits)

    return {
        name: DynamicCache if name == BASELINE else compressed(*bits)
        for name, bits in FORMATS.items()
    }


def held_bytes(cache: Any) -> int:
    """Count the bytes of every tensor storage that can be reached from an object."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack = [cache]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        else:
            stack += getattr(item, "__dict__", {}).values()
            slots: Iterable[str] = getattr(type(item), "__slots__", ())
            stack += [getattr(item, s) for s in slots if hasattr(item, s)]
    return sum(storages.values())


@torch.no_grad()
def generate(model: Any, prompt: Tensor, cache: Any, tokens: int) -> list[int]:
    """Generate greedily, a token a step, from a prompt [1, length]; stops after ``tokens``."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **cache_argument(model, cache),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    return [int(i) for i in out[0, prompt.shape[1] :]]


@torch.no_grad()
def predict(model: Any, ids: Tensor, cache: Any, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict a text through a cache, feeding ``chunk`` tokens at a time.

    Parameters
    ----------
    model
        A causal language model.
    ids : int64 tensor [1, length + 1]
        The text; every token but the first is predicted from the true tokens before it.
    cache
        An empty cache. What a chunk attends to of earlier chunks comes out of it.
    chunk : int
        Tokens fed at a time.

    Yields
    ------
    nats : float64 tensor [n]
        -log p of each token of the chunk.
    best : int64 tensor [n]
        The most probable token of each position.
    """
    for start in range(0, ids.shape[1] - 1, chunk):
        part = ids[:, start : min(start + chunk, ids.shape[1] - 1)]
        target = ids[0, start + 1 : start + 1 + part.shape[1]]
        out = model(input_ids=part, **cache_argument(model, cache), use_cache=True)
        logits = out.logits[0].double()
        yield torch.nn.functional.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)


def _shape(config: Any) -> ModelShape:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(config.num_hidden_layers, config.num_key_value_heads, head_dim)


def measure(
    model: Any,
    tokenizer: Any,
    prompt: str,
    held_out: str,
    *,
    prompt_tokens: int = 768,
    new_tokens: int = 96,
    held_out_tokens: int = 1536,
    chunk: int = 64,
    context: int = 131_072,
    progress: Progress = lambda _: None,
) -> list[CacheResult]:
    """Run a model with each cache of `FORMATS`; the first result is the 16-bit cache's.

    Parameters
    ----------
    model, tokenizer
        As `tq_hf.models.load_model` returns them, in a 16-bit type.
    prompt, held_out : str
        Text to continue (its first ``prompt_tokens``) and text to predict.
    prompt_tokens, new_tokens, held_out_tokens : int
        Upper limits of what is used of them.
    chunk : int
        Tokens fed at a time when text is predicted.
    context : int
        Tokens of the projection.
    progress : callable
        Called with a line of text before each step.

    Raises
    ------
    ValueError
        If a text is too short, or more tokens are asked for than the model's context.
    """
    factories = cache_factories(model.config)
    limit = model.config.max_position_embeddings
    for name, size in (
        ("prompt_tokens + new_tokens", prompt_tokens + new_tokens),
        ("held_out_tokens", held_out_tokens),
    ):
        if size > limit:
            raise ValueError(f"{name}={size} is above the model's context of {limit}; lower it")
    start = [tokenizer.eos_token_id]
    texts = []
    for name, text, size in (
        ("prompt", prompt, prompt_tokens - 1),
        ("held-out text", held_out, held_out_tokens),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)[:size]
        if not ids:
            raise ValueError(f"the {name} has 0 tokens; give text of at least one character")
        texts.append(torch.tensor([start + ids], device=model.device))
    prompt_ids, held_out_ids = texts

    shape = _shape(model.config)
    baseline_bytes = bytes_per_token(shape, 16, 16)
    results: list[CacheResult] = []
    reference: tuple[list[int], Tensor] | None = None
    for name, bits in FORMATS.items():
        progress(f"{name}: generating {new_tokens} tokens after {prompt_ids.shape[1]}")
        tokens = generate(model, prompt_ids, factories[name](), new_tokens)
        progress(f"{name}: predicting {held_out_ids.shape[1] - 1} held-out tokens")
        cache = factories[name]()
        nats, best = zip(*predict(model, held_out_ids, cache, chunk), strict=True)
        choices = torch.cat(best)
        reference = reference or (tokens, choices)
        same = (a == b for a, b in zip(tokens, reference[0], strict=True))
        per_token = bytes_per_token(shape, *bits)
        results.append(
            CacheResult(
                name=name,
                text=tokenizer.decode(tokens),
                same_prefix=next((i for i, equal in enumerate(same) if not equal), len(tokens)),
                generated=len(tokens),
                agreement=float((choices == reference[1]).double().mean()),
                perplexity=math.exp(float(torch.cat(nats).mean())),
                predicted=len(choices),
                bytes_per_token=per_token,
                ratio=baseline_bytes / per_token,
                held_bytes=held_bytes(cache),
                projection_bytes=context * bytes_per_token(LLAMA_8B, *bits),
            )
        )
    return results
