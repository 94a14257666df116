"""Codes of a vector chosen together: error feedback in a metric of the model.

What a rounded key costs is the error of its logits, ``(q . e)^2`` over the queries ``q``; what a
rounded value costs is the error after the output projection ``W``, ``|W e|^2``. Both are
``e^T H e``. With ``H = L D L^T``, coordinates are rounded one after the other, and each makes up
for the errors of those before it. Bytes and decoding are those of any other codes.

References
----------
GPTQ, arXiv 2210.17323; QuIP, arXiv 2307.13304 (LDLQ, of which this is the vector-by-vector form).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from tq_kernels import KVFormat, TokenCodes
from tq_kernels.codec import Kind, pack_codes
from tq_kernels.quantize import codebook_of, to_half
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tq_hf.model_layers import model_layers
from tq_hf.verify.attending import attending

__all__ = ["encode_with_feedback", "error_metrics"]

IMPLEMENTATION = "tq_query_probe"
#: Share of the mean energy that is added to the diagonal of a metric.
_DAMPING = 0.01
_SUMS: ContextVar[dict[int, Tensor] | None] = ContextVar("query_sums", default=None)


def _unit(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor]:
    """Rotated vectors of length one, and their lengths [..., 1]."""
    y = x.float() @ fmt.rotation_matrix().T
    norm = y.norm(dim=-1, keepdim=True)
    return y / norm.clamp_min(1e-30), norm


def _book(fmt: KVFormat, kind: Kind) -> tuple[Tensor, Tensor]:
    book = codebook_of(fmt, kind)
    centroids, boundaries = book.centroids.copy(), book.boundaries.copy()
    return torch.from_numpy(centroids).float(), torch.from_numpy(boundaries).float()


def _packed(codes: Tensor, scale: Tensor, fmt: KVFormat, kind: Kind) -> TokenCodes:
    bits = fmt.k_bits if kind == "k" else fmt.v_bits
    return TokenCodes(pack_codes(codes, bits, kind), to_half(scale))


def encode_with_feedback(
    x: Tensor, fmt: KVFormat, kind: Kind, metric: Tensor, *, carry: bool = True
) -> TokenCodes:
    """Codes of vectors with little error in a metric.

    Parameters
    ----------
    x : float tensor [..., kv_heads, tokens, head_dim]
    fmt : KVFormat
        Its scale is not used: scales are unbiased in the metric.
    kind : {"k", "v"}
    metric : float tensor [kv_heads, head_dim, head_dim]
        Symmetric and positive.
    carry : bool
        Whether coordinates make up for the errors of others; if not, only the scale knows of the
        metric.
    """
    rotation = fmt.rotation_matrix(dtype=torch.float64)
    weight = rotation @ metric.double() @ rotation.T
    mean = weight.diagonal(dim1=-2, dim2=-1).mean(-1)
    weight = weight + _DAMPING * mean[:, None, None] * torch.eye(fmt.head_dim, dtype=weight.dtype)
    root = torch.linalg.cholesky(weight)
    lower = (root / root.diagonal(dim1=-2, dim2=-1)[..., None, :]).float()
    weight = weight.float()
    if not carry:
        lower = torch.zeros_like(lower)
    unit, norm = _unit(x, fmt)
    centroids, boundaries = _book(fmt, kind)
    codes = torch.zeros(unit.shape, dtype=torch.uint8)
    error = torch.zeros_like(unit)
    for j in reversed(range(fmt.head_dim)):
        carried = (error[..., j + 1 :] @ lower[:, j + 1 :, j, None])[..., 0]
        codes[..., j] = torch.bucketize(unit[..., j] - carried, boundaries, right=True)
        error[..., j] = centroids[codes[..., j].int()] - unit[..., j]
    c = centroids[codes.int()]
    seen = unit @ weight
    product = (seen * c).sum(-1)
    scale = norm[..., 0] * (seen * unit).sum(-1) / torch.where(product == 0, 1.0, product)
    return _packed(codes, scale, fmt, kind)


@torch.no_grad()
def error_metrics(model: Any, windows: Iterable[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Metrics of the keys and the values of each layer, [kv_heads, head_dim, head_dim].

    Parameters
    ----------
    model
        Built as Llama and Qwen2 are.
    windows : iterable of int64 tensors [batch, tokens]
        Calibration text, for the second moments of the queries; those of values come from the
        weights.

    Raises
    ------
    TQError
        For models that are built otherwise.
    """
    layers = getattr(getattr(model, "model", None), "layers", ())
    full = [i for i, layer in enumerate(model_layers(model.config)) if layer.kind == "full"]
    parts: list[Any] = [
        getattr(getattr(layer, "self_attn", None), "o_proj", None) for layer in layers
    ]
    missing = [i for i in full if i >= len(parts) or parts[i] is None]
    if missing:
        raise TQError(
            f"{type(model).__name__} has no model.layers[i].self_attn.o_proj in layers {missing}: "
            "metrics are for models built as Llama is; search without them"
        )
    sums: dict[int, Tensor] = {}
    with attending(model, IMPLEMENTATION, _SUMS, sums):
        for ids in windows:
            model(input_ids=ids, use_cache=False)
    found = {}
    for layer in full:
        keys = sums[layer]
        kv_heads, dim, _ = keys.shape
        projection = parts[layer].weight.double()
        split = projection.reshape(projection.shape[0], kv_heads, -1, dim)
        found[layer] = (keys, torch.einsum("ohgd,ohge->hde", split, split))
    return found


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    sums = _SUMS.get()
    layer: Any = getattr(module, "layer_idx", None)
    if sums is None or layer is None:
        raise TQError(f"{IMPLEMENTATION!r} attention runs inside tq_hf.verify.feedback only")
    batch, _, tokens, dim = query.shape
    split = query.double().reshape(batch, key.shape[1], -1, tokens, dim)
    moment = torch.einsum("bhgtd,bhgte->hde", split, split) / (batch * split.shape[2] * tokens)
    sums[layer] = sums.get(layer, 0.0) + moment
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=kwargs.get("scaling")
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
