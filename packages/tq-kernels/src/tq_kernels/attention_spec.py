"""What every attention plan is told once, and the checks of what a run is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.checks import FLOATS, check_format, check_pages, check_softmax, check_tensor
from tq_kernels.format import KVFormat

__all__ = ["AttentionSpec"]


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer on one device; invalid ones cannot be built.

    Parameters
    ----------
    fmt : KVFormat
    heads, kv_heads : int
        Query and KV heads; ``heads`` is a multiple of ``kv_heads``.
    max_batch : int
        Most sequences of a run.
    max_query_len : int
        Most query tokens of one sequence in a run.
    dtype : torch.dtype
        Of queries and outputs: fp16, bf16 or float32.
    device : torch.device
    softmax_scale : float, optional
        Factor of the logits, ``head_dim ** -0.5`` if not given.
    soft_cap : float, optional
        Logits become ``soft_cap * tanh(logit / soft_cap)``.
    sliding_window : int, optional
        A query sees this many of the most recent tokens, itself included.

    Raises
    ------
    TQError
        For a value outside of these.
    """

    fmt: KVFormat
    heads: int
    kv_heads: int
    max_batch: int
    max_query_len: int
    dtype: torch.dtype
    device: torch.device
    softmax_scale: float | None = None
    soft_cap: float | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        check_format(self.fmt)
        object.__setattr__(self, "device", _indexed(torch.device(self.device)))
        for name in ("heads", "kv_heads", "max_batch", "max_query_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TQError(f"{name}={value!r}: needs an int of at least 1")
        if self.heads % self.kv_heads:
            raise TQError(
                f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}; pass the numbers "
                "of the model"
            )
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TQError(
                f"dtype={self.dtype}: kernels take float16, bfloat16 or float32; use the _ref "
                "operation for others"
            )
        check_softmax(self.softmax_scale, self.soft_cap, self.sliding_window)

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.fmt.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def max_tokens(self) -> int:
        """Most query tokens of a run."""
        return self.max_batch * self.max_query_len

    def check_run(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        cu_query_lens: Tensor | None = None,
        sinks: Tensor | None = None,
        key_center: Tensor | None = None,
    ) -> None:
        """Raise unless the arguments of a run fit the plan; looks at no contents."""
        fmt, device = self.fmt, self.device
        check_tensor("q", q, (None, self.heads, fmt.head_dim), (self.dtype,), device)
        tokens = q.shape[0]
        check_pages(pages, fmt, self.kv_heads, device)
        check_tensor("lengths", lengths, (None,), (torch.int32,), device)
        batch = lengths.shape[0]
        if batch > self.max_batch or tokens > self.max_tokens:
            raise TQError(
                f"{batch} sequences with {tokens} query tokens: the plan was made for "
                f"{self.max_batch} with {self.max_query_len} each; make a larger plan"
            )
        check_tensor("block_table", block_table, (batch, None), (torch.int32,), device)
        check_tensor("out", out, (tokens, self.heads, fmt.head_dim), (self.dtype,), device)
        check_tensor("lse", lse, (tokens, self.heads), (torch.float32,), device)
        for name, tensor in (("q", q), ("out", out), ("lse", lse), ("block_table", block_table)):
            if tensor.numel() and tensor.stride(-1) != 1:
                raise TQError(
                    f"{name} has stride {tensor.stride(-1)} in the last dimension: needs 1; call "
                    ".contiguous()"
                )
        if cu_query_lens is not None:
            check_tensor("cu_query_lens", cu_query_lens, (batch + 1,), (torch.int32,), device)
        elif tokens != batch:
            raise TQError(
                f"q has {tokens} tokens for {batch} sequences: needs one each; pass cu_query_lens "
                "for other numbers"
            )
        for name, vector in (("cu_query_lens", cu_query_lens), ("lengths", lengths)):
            if vector is not None and not vector.is_contiguous():
                raise TQError(f"{name} is not contiguous: call .contiguous()")
        if sinks is not None:
            check_tensor("sinks", sinks, (self.heads,), FLOATS[:3], device)
        if key_center is not None:
            shape = (self.kv_heads, fmt.head_dim)
            check_tensor("key_center", key_center, shape, FLOATS[:3], device)
        for name, extra in (("sinks", sinks), ("key_center", key_center)):
            if extra is not None and not extra.is_contiguous():
                raise TQError(f"{name} is not contiguous: call .contiguous()")


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` as the current one of its devices, so that devices compare equal."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
