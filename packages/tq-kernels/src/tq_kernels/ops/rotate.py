"""Rotate vectors, or rotate them back."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from tq_core import HadamardRotation, TQError

from tq_kernels.checks import FLOATS, check_format
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import portable_kernels

__all__ = ["compute_dtype", "rotate", "rotate_ref", "rotate_unchecked"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hadamard_transform(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, in the order of the specification."""
    n = x.shape[-1]
    stride = 1
    while stride < n:
        a, b = x.reshape(*x.shape[:-1], n // (2 * stride), 2, stride).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return x * math.sqrt(1.0 / n)


def _cross_halves(x: Tensor) -> Tensor:
    """Orthonormal sums and differences of the two halves of the last axis; its own inverse."""
    first, last = x.chunk(2, dim=-1)
    root = math.sqrt(0.5)
    return torch.cat(((first + last) * root, (first - last) * root), dim=-1)


def _transform(x: Tensor, power: int, last: bool) -> Tensor:
    """Transform the first, or the ``last``, ``power`` coordinates and keep the others."""
    dim = x.shape[-1]
    if power == dim:
        return hadamard_transform(x)
    if last:
        kept, part = x[..., : dim - power], x[..., dim - power :]
        return torch.cat((kept, hadamard_transform(part)), dim=-1)
    part, kept = x[..., :power], x[..., power:]
    return torch.cat((hadamard_transform(part), kept), dim=-1)


@lru_cache(maxsize=64)
def _signs(fmt: KVFormat, device: torch.device, dtype: torch.dtype) -> Tensor:
    rotation = fmt.core_rotation
    assert isinstance(rotation, HadamardRotation)
    return torch.from_numpy(rotation.signs.copy()).to(device=device, dtype=dtype)


def rotate_unchecked(x: Tensor, fmt: KVFormat, inverse: bool = False) -> Tensor:
    """Rotation of float32 or float64 vectors in their dtype.

    float64 and Hadamard take the steps of the specification in their order, so that results
    equal those of tq-core bit for bit; float32 on the CPU takes one matrix product.
    """
    if fmt.rotation == "haar" or (x.dtype == torch.float32 and x.device.type == "cpu"):
        matrix = fmt.rotation_matrix(x.device, x.dtype)
        return x @ (matrix if inverse else matrix.T)
    signs = _signs(fmt, x.device, x.dtype)
    power = 1 << (fmt.head_dim.bit_length() - 1)
    steps = range(len(signs))
    for n in reversed(steps) if inverse else steps:
        last = power < fmt.head_dim and n % 2 == 1
        if inverse:
            x = _transform(_cross_halves(x) if last else x, power, last) * signs[n]
        else:
            x = _transform(x * signs[n], power, last)
            x = _cross_halves(x) if last else x
    return x


def _check(x: Tensor, fmt: KVFormat) -> None:
    check_format(fmt)
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TQError(f"x is {kind}: pass a tensor of float16, bfloat16, float32 or float64")
    if x.dim() == 0 or x.shape[-1] != fmt.head_dim:
        raise TQError(
            f"x has shape {tuple(x.shape)}: the last dimension must be head_dim={fmt.head_dim}; "
            "use the KVFormat of this head_dim"
        )


def rotate_ref(x: Tensor, fmt: KVFormat, inverse: bool = False) -> Tensor:
    """``R x`` for every vector, or ``Rᵀ x``.

    Parameters
    ----------
    x : float tensor [..., head_dim]
        fp16, bf16, float32 or float64, any device. 16-bit inputs are computed in float32.
    fmt : KVFormat
    inverse : bool
        Rotate back.

    Returns
    -------
    tensor like ``x``

    Raises
    ------
    TQError
        For another dtype or last dimension.
    """
    _check(x, fmt)
    return rotate_unchecked(x.to(compute_dtype(x.dtype)), fmt, inverse).to(x.dtype)


def rotate(x: Tensor, fmt: KVFormat, inverse: bool = False) -> Tensor:
    """``R x`` for every vector, or ``Rᵀ x``, in one launch: the kernel for `rotate_ref`.

    Parameters
    ----------
    x : fp16, bf16 or float32 tensor [..., head_dim]
        Rows whose strides cannot be merged into one are copied.
    fmt : KVFormat
    inverse : bool
        Rotate back.

    Returns
    -------
    tensor like ``x``, contiguous
        Errors are those of the dtype or, for float32, below 1e-6 of the norm of the vector. bf16
        vectors with a norm above 2**114 overflow.

    Raises
    ------
    TQError
        For another dtype or last dimension; where Triton cannot run.
    """
    _check(x, fmt)
    if x.dtype == torch.float64:
        raise TQError(
            "x has dtype torch.float64: the kernel takes float16, bfloat16 or float32; convert it "
            "or use rotate_ref"
        )
    kernels = portable_kernels("rotate", x.device)
    rows = x.reshape(-1, fmt.head_dim)
    if rows.numel() and rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.rotate(rows, out.view(-1, fmt.head_dim), fmt, inverse)
    return out
