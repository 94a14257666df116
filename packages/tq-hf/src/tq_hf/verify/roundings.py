"""What caches do to keys and values: TurboQuant's formats, and those of competitors.

Each function returns a `RoundedHistory`. Competitors are written from their descriptions: the
arithmetic, not the code, of each; ``slot_bytes`` counts their scales and zero points.

References
----------
KIVI, arXiv 2402.02750 (per-channel keys, per-token values, groups of 32).
vLLM's ``int4_per_token_head``, ``fp8`` and ``turboquant_*`` cache types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor
from tq_core import OutlierQuantizer, TQError, gaussian_codebook
from tq_kernels import KVFormat, decode_tokens, encode_tokens
from tq_kernels.codec import Kind
from tq_kernels.format import ScaleName

from tq_hf.bits import EXACT
from tq_hf.verify.feedback import encode_with_feedback
from tq_hf.verify.simulate import RoundedHistory, Rounding

__all__ = [
    "fp8",
    "integers",
    "kivi",
    "outliers",
    "turboquant",
    "uniform",
    "vllm_turboquant",
]

Centers = Mapping[int, Tensor] | int | None


def _subtracted(keys: Rounding, centers: Centers) -> Rounding:
    if centers is None:
        return keys

    def rounding(x: Tensor, layer: int) -> Tensor:
        if isinstance(centers, int):
            center = x[..., :centers, :].mean(dim=-2, keepdim=True)
        else:
            center = centers[layer][:, None].to(x)
        return keys(x - center, layer) + center

    return rounding


def turboquant(
    fmt: KVFormat,
    *,
    centers: Centers = None,
    own_seeds: bool = False,
    layer_bits: Sequence[tuple[int, int]] | None = None,
    metrics: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    carry: bool = True,
    search: bool = False,
    **options: Any,
) -> RoundedHistory:
    """TurboQuant's codes, encoded and decoded by tq-kernels.

    Parameters
    ----------
    fmt : KVFormat
    centers : mapping of int to float tensor [kv_heads, head_dim], or int, optional
        Subtracted from the keys of each layer; a number takes the mean of that many tokens
        after the sinks of the text itself.
    own_seeds : bool
        A rotation of its own for every layer, keys and values apart.
    layer_bits : sequence of pair of int, optional
        Bits of keys and values of every layer, in place of the format's; here 16 may stand for
        one half of a layer alone.
    metrics : mapping of int to pair of tensors, optional
        Of `tq_hf.verify.feedback.error_metrics`, to encode with error feedback, or to search with.
    carry : bool
        As for `tq_hf.verify.feedback.encode_with_feedback`.
    search : bool
        Whether to search codes; see `tq_kernels.encode_tokens`.
    options
        Of `RoundedHistory`.
    """

    def code(x: Tensor, layer: int, kind: Kind) -> Tensor:
        own = replace(fmt, seed=2 * layer + (kind == "v") + 1) if own_seeds else fmt
        half = 0 if kind == "k" else 1
        if layer_bits is not None:
            bits = layer_bits[layer][half]
            if bits == EXACT[half]:
                return x
            own = replace(own, k_bits=bits, v_bits=bits)
        wide = torch.promote_types(x.dtype, torch.float32)
        metric = None if metrics is None else metrics[layer][half]
        if metric is not None and not search:
            codes = encode_with_feedback(x, own, kind, metric, carry=carry)
        else:
            codes = encode_tokens(x, own, kind, search=search, metric=metric)
        return decode_tokens(codes, own, kind, wide)

    return RoundedHistory(
        _subtracted(lambda x, layer: code(x, layer, "k"), centers),
        lambda x, layer: code(x, layer, "v"),
        fmt.slot_bytes if layer_bits is None else _mean_slot(fmt, layer_bits),
        **options,
    )


def _mean_slot(fmt: KVFormat, layer_bits: Sequence[tuple[int, int]]) -> float:
    """Bytes of a token and KV head, averaged over layers."""
    halves = [
        2 * fmt.head_dim
        if bits == EXACT[0]
        else replace(fmt, k_bits=bits, v_bits=bits).slot_bytes / 2
        for pair in layer_bits
        for bits in pair
    ]
    return sum(halves) / len(layer_bits)


def uniform(x: Tensor, bits: int) -> Tensor:
    """Uniform levels from the minimum to the maximum of the last axis, both as fp16 numbers."""
    low = x.amin(-1, keepdim=True).half().float()
    step = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = ((x - low) / step.clamp_min(1e-12)).round().clamp(0, 2**bits - 1)
    restored: Tensor = codes * step + low
    return restored


def integers(
    head_dim: int, bits: int, *, centers: Centers = None, **options: Any
) -> RoundedHistory:
    """Integers with scale and zero point a token and head, after a random Hadamard rotation."""
    matrix = KVFormat(head_dim, rounds=1).rotation_matrix()

    def rounding(x: Tensor, layer: int) -> Tensor:
        restored: Tensor = uniform(x.float() @ matrix.T, bits) @ matrix
        return restored

    slot = 2 * (head_dim * bits / 8 + 4)
    return RoundedHistory(_subtracted(rounding, centers), rounding, slot, **options)


def fp8(head_dim: int, *, centers: Centers = None, **options: Any) -> RoundedHistory:
    """FP8 e4m3 with a scale of 1."""

    def rounding(x: Tensor, layer: int) -> Tensor:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()

    return RoundedHistory(_subtracted(rounding, centers), rounding, 2 * head_dim, **options)


@cache
def _gaussian(bits: int, dim: int) -> tuple[Tensor, Tensor]:
    book = gaussian_codebook(bits)
    return tuple(
        torch.from_numpy(np.asarray(part) / np.sqrt(dim)).float()
        for part in (book.centroids, book.boundaries)
    )  # type: ignore[return-value]


def vllm_turboquant(head_dim: int, name: str, **options: Any) -> RoundedHistory:
    """vLLM's ``turboquant_*`` cache types.

    Keys: Hadamard transform without signs, Lloyd-Max codes of the Gaussian limit, norms matched;
    ``k8v4`` has FP8 keys. Values: uniform, not rotated. Its layers kept at 16 bits are not
    counted: give ``skip_layers``.

    Raises
    ------
    TQError
        For an unknown name.
    """
    bits = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}.get(name)
    if bits is None:
        raise TQError(f"vLLM has no turboquant_{name}: choose k8v4, 4bit_nc, k3v4_nc or 3bit_nc")
    k_bits, v_bits = bits
    matrix = torch.from_numpy(hadamard(head_dim) / np.sqrt(head_dim)).float()
    centroids, boundaries = _gaussian(k_bits, head_dim)

    def codes(x: Tensor, layer: int) -> Tensor:
        y = x.float() @ matrix.T
        norm = y.norm(dim=-1, keepdim=True)
        c = centroids[torch.bucketize(y / norm.clamp_min(1e-20), boundaries)]
        restored: Tensor = c * (norm / c.norm(dim=-1, keepdim=True)).half().float()
        return restored @ matrix

    def values(x: Tensor, layer: int) -> Tensor:
        return uniform(x.float(), v_bits)

    k_bytes = head_dim if k_bits == 8 else head_dim * k_bits / 8 + 2
    keys = fp8(head_dim).keys if k_bits == 8 else codes
    return RoundedHistory(keys, values, k_bytes + head_dim * v_bits / 8 + 4, **options)


def kivi(head_dim: int, bits: int, *, group: int = 32, **options: Any) -> RoundedHistory:
    """KIVI: keys uniform along groups of tokens of a channel, values along channels of a token."""

    def keys(x: Tensor, layer: int) -> Tensor:
        batch, heads, tokens, dim = x.shape
        grouped = x.float().reshape(batch, heads, tokens // group, group, dim).transpose(-1, -2)
        return uniform(grouped, bits).transpose(-1, -2).reshape(x.shape)

    def values(x: Tensor, layer: int) -> Tensor:
        grouped = x.float().reshape(*x.shape[:-1], -1, group)
        return uniform(grouped, bits).flatten(-2)

    slot = 2 * (head_dim * bits / 8 + 4 * head_dim / group)
    return RoundedHistory(keys, values, slot, block_tokens=group, **options)


def outliers(
    calibration: Mapping[int, tuple[Tensor, Tensor]],
    rate: float,
    *,
    scale: ScaleName = "unbiased",
    centers: Centers = None,
    **options: Any,
) -> RoundedHistory:
    """The paper's fractional rates: channels of most energy get one more bit (section 4.3).

    Parameters
    ----------
    calibration : mapping of int to pair of tensors [kv_heads, tokens, head_dim]
        Keys and values of each layer, from which the channels of each head are chosen.
    rate : float
        Bits a number, both scales included.
    scale : str
        Of both groups of channels; the paper's is ``none``.
    centers
        As `turboquant`'s; subtract them from the calibration keys as well.
    options
        Of `RoundedHistory`.
    """
    quantizers: dict[tuple[int, int, int], OutlierQuantizer] = {}
    for layer, pair in calibration.items():
        for kind, states in enumerate(pair):
            for head, rows in enumerate(states):
                quantizers[layer, kind, head] = OutlierQuantizer.for_rate(
                    rows.double().numpy(), rate, scale=scale
                )

    def rounding(x: Tensor, layer: int, kind: int) -> Tensor:
        heads = []
        for head in range(x.shape[1]):
            quantizer = quantizers[layer, kind, head]
            rows = quantizer.encode(x[:, head].double().numpy())
            heads.append(torch.from_numpy(quantizer.decode(rows)))
        return torch.stack(heads, dim=1).to(x.dtype)

    head_dim = next(iter(calibration.values()))[0].shape[-1]
    return RoundedHistory(
        _subtracted(lambda x, layer: rounding(x, layer, 0), centers),
        lambda x, layer: rounding(x, layer, 1),
        2 * head_dim * rate / 8,
        **options,
    )
