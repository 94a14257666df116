"""Vectors to codes and scales, and the bytes of whole tokens (``docs/format.md``, 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from tq_core import Codebook, TQError

from tq_kernels.checks import FLOATS, values_checked
from tq_kernels.codec import Kind, pack_codes, unpack_codes
from tq_kernels.format import KVFormat
from tq_kernels.ops.rotate import compute_dtype, rotate_unchecked

__all__ = [
    "TokenCodes",
    "check_finite",
    "codebook_of",
    "decode_tokens",
    "encode_tokens",
    "quantize",
    "step_of",
    "to_half",
]

LARGEST_SCALE = 65504.0
#: Factors of a vector that a search tries, the nearest codes first.
SEARCHED = (1.0, *(1 + 0.02 * i for i in range(-10, 11) if i))


@dataclass(frozen=True, eq=False)
class TokenCodes:
    """Keys, or values, as bytes and scales.

    Attributes
    ----------
    planes : tuple of uint8 tensors [..., tokens, head_dim * width / 8]
        See `tq_kernels.codec.pack_codes`.
    scales : fp16 tensor [..., tokens]
    """

    planes: tuple[Tensor, ...]
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(t.numel() * t.element_size() for t in (*self.planes, self.scales))

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.scales.shape[-1])

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenCodes:
        """Apply ``function`` to every plane and to the scales.

        For operations on the leading dimensions, which planes and scales share, such as
        ``lambda t: t[index]``.
        """
        return TokenCodes(tuple(function(p) for p in self.planes), function(self.scales))

    def narrow(self, start: int, stop: int) -> TokenCodes:
        """View of tokens ``start`` to ``stop``."""
        planes = tuple(p[..., start:stop, :] for p in self.planes)
        return TokenCodes(planes, self.scales[..., start:stop])

    def cat(self, other: TokenCodes) -> TokenCodes:
        """These tokens followed by those of ``other``."""
        pairs = zip(self.planes, other.planes, strict=True)
        planes = tuple(torch.cat(pair, dim=-2) for pair in pairs)
        return TokenCodes(planes, torch.cat((self.scales, other.scales), dim=-1))


def codebook_of(fmt: KVFormat, kind: Kind) -> Codebook:
    """Codebook of the keys or the values."""
    return fmt.k_codebook if kind == "k" else fmt.v_codebook


def step_of(fmt: KVFormat, kind: Kind) -> float:
    """Distance of neighbouring levels: centroids over it are half-integers."""
    step = codebook_of(fmt, kind).step
    assert step is not None  # codebooks of pages lie on a grid
    return float(step)


@lru_cache(maxsize=256)
def _book_tensors(
    fmt: KVFormat, kind: Kind, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Centroids and boundaries; exact in float32."""
    book = codebook_of(fmt, kind)
    return (
        torch.from_numpy(book.centroids.copy()).to(device=device, dtype=dtype),
        torch.from_numpy(book.boundaries.copy()).to(device=device, dtype=dtype),
    )


def to_half(x: Tensor) -> Tensor:
    """fp16 of float32 or float64, rounded once to nearest even."""
    if x.dtype != torch.float64:
        return x.to(torch.float16)
    # By way of float32 rounded to odd, which leaves the second rounding the right one.
    single = x.to(torch.float32)
    back = single.to(torch.float64)
    inexact_even = (back != x) & ((single.view(torch.int32) & 1) == 0)
    infinity = torch.tensor(float("inf"), device=x.device)
    toward = torch.where(x > back, infinity, -infinity)
    return torch.where(inexact_even, torch.nextafter(single, toward), single).to(torch.float16)


def _exponents(x: Tensor) -> Tensor:
    """Exponents [...] int32 such that ``x * 2**-e`` has its largest magnitude in [0.5, 1)."""
    return torch.frexp(x.abs().amax(dim=-1)).exponent


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent``; each of the two factors is a normal number and exact."""
    double = x.dtype == torch.float64
    bias, shift = (1023, 52) if double else (127, 23)
    half = torch.div(exponent, 2, rounding_mode="floor")
    for part in (half, exponent - half):
        bits = (part.to(torch.int64 if double else torch.int32) + bias) << shift
        x = x * bits.view(x.dtype)
    return x


def check_finite(x: Tensor, name: str) -> None:
    """Raise unless all values are finite; names the first one that is not."""
    if not bool(torch.isfinite(x).all()):
        index = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise TQError(
            f"{name}{index} is {float(x[tuple(index)])}: only finite values can be quantized; "
            "replace it, for example with torch.nan_to_num"
        )


def quantize(
    x: Tensor, fmt: KVFormat, kind: Kind, *, search: bool = False, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors.

    Parameters
    ----------
    x : float tensor [..., head_dim]
        Computed in float64 for float64, else in float32.
    fmt : KVFormat
    kind : {"k", "v"}
    search : bool
        Whether to try the factors of `SEARCHED` on every vector and take the codes of least error,
        once their scale is unbiased. Else codes are the nearest.
    metric : float tensor [kv_heads, head_dim, head_dim], optional
        Errors ``e`` of a search are compared by ``e @ metric @ e``, for ``x`` [..., kv_heads,
        tokens, head_dim]. Not given: by their length.

    Returns
    -------
    codes : uint8 tensor [..., head_dim]
        A coordinate on a boundary gets the upper code.
    scales : fp16 tensor [...]

    Raises
    ------
    TQError
        For values that are not finite or a scale above 65504 (on the CPU or in debug mode).
    """
    if x.dtype not in FLOATS:
        raise TQError(f"{kind} has dtype {x.dtype}: use float16, bfloat16, float32 or float64")
    if metric is not None and not search:
        raise TQError("metric is for a search: add search=True or leave it out")
    checked = values_checked(x)
    if checked:
        check_finite(x, kind)
    values = x.to(compute_dtype(x.dtype))
    if values.numel() == 0:
        empty = torch.zeros(values.shape[:-1], dtype=torch.float16, device=x.device)
        return values.to(torch.uint8), empty
    exponent = _exponents(values)
    values = _ldexp(values, -exponent[..., None])
    norm = (values * values).sum(dim=-1).sqrt()
    zero = norm == 0
    y = rotate_unchecked(values, fmt)
    centroids, boundaries = _book_tensors(fmt, kind, y.device, y.dtype)
    unit = y / torch.where(zero, 1.0, norm)[..., None]
    if search:
        codes = _searched(unit, centroids, boundaries, _rotated(metric, fmt, unit))
    else:
        codes = torch.bucketize(unit, boundaries, right=True, out_int32=True)
    c = centroids[codes]
    if fmt.scale == "none":
        scale = norm
    elif fmt.scale == "mse":
        scale = (y * c).sum(dim=-1) / (c * c).sum(dim=-1)
    elif fmt.scale == "norm":
        scale = norm / (c * c).sum(dim=-1).sqrt()
    else:
        scale = norm * (norm / torch.where(zero, 1.0, (y * c).sum(dim=-1)))
    scale = _ldexp(torch.where(zero, 0.0, scale), exponent)
    if checked and bool((scale > LARGEST_SCALE).any()):
        index = (scale > LARGEST_SCALE).nonzero()[0].tolist()
        raise TQError(
            f"scale of vector {kind}{index} is {float(scale[tuple(index)]):.6g}: fp16 holds at "
            f"most {LARGEST_SCALE:.0f}; divide {kind} by a constant and fold it into the weights"
        )
    return codes.to(torch.uint8), to_half(scale)


def _rotated(metric: Tensor | None, fmt: KVFormat, like: Tensor) -> Tensor | None:
    """The metric of rotated vectors."""
    if metric is None:
        return None
    heads, dim = like.shape[-3] if like.dim() > 2 else None, fmt.head_dim
    if metric.shape != (heads, dim, dim):
        raise TQError(
            f"metric has shape {tuple(metric.shape)} and vectors {tuple(like.shape)}: needs "
            f"[kv_heads, {dim}, {dim}] and [..., kv_heads, tokens, {dim}]"
        )
    matrix = fmt.rotation_matrix(like.device, like.dtype)
    rotated: Tensor = matrix @ metric.to(like) @ matrix.T
    return rotated


def _searched(unit: Tensor, centroids: Tensor, boundaries: Tensor, metric: Tensor | None) -> Tensor:
    """Codes of unit vectors, at one of the factors, whose unbiased codeword has least error."""
    best = torch.full_like(unit[..., :1], torch.inf)
    codes = torch.zeros_like(unit, dtype=torch.int32)
    for factor in SEARCHED:
        tried = torch.bucketize(unit * factor, boundaries, right=True, out_int32=True)
        c = centroids[tried]
        product = (unit * c).sum(dim=-1, keepdim=True)
        error = c / torch.where(product == 0, 1.0, product) - unit
        weighted = error if metric is None else error @ metric
        cost = (weighted * error).sum(dim=-1, keepdim=True)
        better = cost < best
        codes, best = torch.where(better, tried, codes), torch.where(better, cost, best)
    return codes


def encode_tokens(
    x: Tensor, fmt: KVFormat, kind: Kind, *, search: bool = False, metric: Tensor | None = None
) -> TokenCodes:
    """Quantize and pack vectors [..., tokens, head_dim]; see `quantize`."""
    codes, scales = quantize(x, fmt, kind, search=search, metric=metric)
    bits = fmt.k_bits if kind == "k" else fmt.v_bits
    return TokenCodes(pack_codes(codes, bits, kind), scales)


def decode_tokens(
    codes: TokenCodes, fmt: KVFormat, kind: Kind, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Vectors [..., tokens, head_dim] of ``codes``, computed in float32 (float64 for float64)."""
    bits = fmt.k_bits if kind == "k" else fmt.v_bits
    index = unpack_codes(codes.planes, bits, kind).to(torch.int32)
    compute = compute_dtype(dtype)
    centroids, _ = _book_tensors(fmt, kind, index.device, compute)
    y = centroids[index] * codes.scales.to(compute)[..., None]
    return rotate_unchecked(y, fmt, inverse=True).to(dtype)
