"""The network as it is trained: Llama and Qwen2 layers in plain PyTorch.

Parameter names and arithmetic are those of transformers' ``LlamaForCausalLM`` and
``Qwen2ForCausalLM`` with tied embeddings, so the state dict loads there as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``bias`` selects Qwen2's biased query, key and value projections."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    context: int = 2048
    rope_theta: float = 10000.0
    bias: bool = False
    eps: float = 1e-6

    def hf_config(self) -> dict[str, Any]:
        """Return the ``config.json`` that transformers 4.57 and 5.x both read."""
        kind = "qwen2" if self.bias else "llama"
        config: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM" if self.bias else "LlamaForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }
        if self.bias:
            config["use_sliding_window"] = False
        else:
            config |= {"attention_bias": False, "mlp_bias": False}
        return config


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding; x [batch, heads, tokens, head_dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q, bias=shape.bias)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=shape.bias)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=shape.bias)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        dim = self.shape.head_dim
        q = rotate(self.q_proj(x).view(batch, tokens, -1, dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, tokens, -1, dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class MLP(nn.Module):
    """Gated SiLU feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.eps)


class CausalLM(nn.Module):
    """A causal language model with tied embeddings.

    Calling it with ``tokens`` [batch, length + 1] returns the mean cross entropy in nats;
    `logits` returns the logits [batch, length, vocabulary].
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    last = name.endswith(("o_proj.weight", "down_proj.weight"))
                    std = 0.02 / (2 * shape.layers) ** 0.5 if last else 0.02
                    parameter.normal_(0.0, std, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.context).float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return next-token logits for ``tokens`` [batch, length]."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.logits(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def set_large_key_biases(model: CausalLM, seed: int = 0) -> None:
    """Give each key head large biases on a few channels of the slowest rotary frequencies.

    Eight channels a head get a magnitude drawn log-uniformly from 30 to 150 and a random sign,
    as measured key biases of Qwen2.5 models look. Training goes on from there.
    """
    shape = model.shape
    if not shape.bias:
        raise ValueError("bias=False has no key bias to set; use Shape(bias=True)")
    generator = torch.Generator().manual_seed(seed)
    half = shape.head_dim // 2
    slow = torch.cat((torch.arange(half * 3 // 4, half), torch.arange(half * 7 // 4, half * 2)))
    with torch.no_grad():
        for layer in model.model.layers:
            assert isinstance(layer, Layer)
            bias = layer.self_attn.k_proj.bias.view(shape.kv_heads, shape.head_dim)
            for head in range(shape.kv_heads):
                channels = slow[torch.randperm(slow.numel(), generator=generator)[:8]]
                size = 30.0 * 5.0 ** torch.rand(8, generator=generator)
                sign = torch.randint(0, 2, (8,), generator=generator) * 2 - 1
                bias[head, channels] = size * sign
