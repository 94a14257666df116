"""Vector quantizers: least squared error, and unbiased inner products with a sign sketch.

References
----------
TurboQuant, arXiv 2504.19874: algorithm 1 (``MSEQuantizer``) and 2 (``InnerProductQuantizer``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tq_core.codebook import Codebook, GridName, lloyd_max
from tq_core.distribution import SphereCoordinate
from tq_core.errors import TQError
from tq_core.inputs import as_vectors, check_finite, normalise
from tq_core.packing import pack_bits, packed_size, unpack_bits
from tq_core.rotation import HaarRotation, Rotation, make_rotation
from tq_core.scale import ScaleName, check_scale, round_scales, vector_scales
from tq_core.splitmix import check_seed, splitmix64, standard_normals

__all__ = ["Encoded", "InnerProductEncoded", "InnerProductQuantizer", "MSEQuantizer"]

Float = NDArray[np.float64]
Bytes = NDArray[np.uint8]

# Bytes of coordinates handled at once. Much larger arrays would be taken anew from the system every
# time.
_CHUNK_BYTES = 1 << 19
# Squared norms of vectors that need no scaling against overflow and lost digits.
_ORDINARY = {
    np.dtype(np.float32): (1e-20, 1e20),
    np.dtype(np.float64): (1e-200, 1e200),
}

SCALE_REMEDY = "use scale_dtype='float64' or divide the input by a constant"


def chunks(rows: int, dim: int, dtype: DTypeLike = np.float64) -> Iterator[slice]:
    """Slices of rows that keep temporary arrays small."""
    size = max(1, _CHUNK_BYTES // (np.dtype(dtype).itemsize * dim))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def encode_rows(
    rows: NDArray[np.floating],
    rotation: Rotation,
    codebook: Codebook,
    scale: str,
    compute_dtype: DTypeLike = np.float64,
    *,
    whole: NDArray[np.floating],
    name: str = "x",
) -> tuple[Bytes, Float]:
    """Codes (uint8 [n, dim]) and float64 scales [n] of vectors [n, dim].

    Vectors whose norm is not far from the limits of ``compute_dtype`` are computed in it as they
    are, the others in float64 after a multiplication by a power of two. For a value that is not
    finite it raises with the index in ``whole``, the caller's array.
    """
    low, high = _ORDINARY[np.dtype(compute_dtype)]
    with np.errstate(over="ignore", under="ignore"):
        x = rows.astype(compute_dtype, copy=False)
        squares = np.einsum("ij,ij->i", x, x)
    ordinary = (squares > low) & (squares < high)
    if ordinary.all():
        return _encode(x, np.sqrt(squares), rotation, codebook, scale)
    if not np.isfinite(rows).all():
        check_finite(whole, name)
    codes, scales = np.empty(rows.shape, dtype=np.uint8), np.empty(len(rows))
    codes[ordinary], scales[ordinary] = _encode(
        x[ordinary], np.sqrt(squares[ordinary]), rotation, codebook, scale
    )
    scaled, exponent = normalise(rows[~ordinary])
    norm = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
    codes[~ordinary], own = _encode(scaled, norm, rotation, codebook, scale)
    with np.errstate(over="ignore"):
        scales[~ordinary] = np.ldexp(own, exponent)
    return codes, scales


def _encode(
    x: NDArray[np.floating],
    norm: NDArray[np.floating],
    rotation: Rotation,
    codebook: Codebook,
    scale: str,
) -> tuple[Bytes, Float]:
    y = x @ rotation.matrix32.T if x.dtype == np.float32 else rotation.apply(x)
    codes = codebook.encode_scaled(y, 1.0 / np.where(norm == 0.0, 1.0, norm).astype(x.dtype))
    scales = vector_scales(y, codebook.decode(codes, y.dtype), norm, scale)
    return codes, np.asarray(scales, dtype=np.float64)


def scale_dtype_for(x: NDArray[np.floating], dtype: DTypeLike | None) -> np.dtype[np.floating]:
    """Dtype of the stored scales: as asked, else float64 for float64 input and float32 below."""
    if dtype is None:
        return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    for choice in (np.float16, np.float32, np.float64):
        if np.dtype(dtype) == np.dtype(choice):
            return np.dtype(choice)
    raise TQError(f"scale_dtype={dtype!r}: choose float16, float32, float64 or None")


def _frozen(*arrays: NDArray[np.generic]) -> None:
    for array in arrays:
        array.setflags(write=False)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Codes and scales of vectors; everything that has to be stored to decode them.

    Attributes
    ----------
    data : uint8 array [..., ceil(dim * bits / 8)]
        Densely packed codes (``docs/format.md``, section 7), read-only.
    scales : float array [...]
        One scale a vector, read-only.
    dim, bits : int
        Coordinates a vector and bits a coordinate.
    """

    data: Bytes
    scales: NDArray[np.floating]
    dim: int
    bits: int

    def __post_init__(self) -> None:
        expected = (*self.scales.shape, packed_size(self.dim, self.bits))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise TQError(
                f"data of dtype {self.data.dtype} and shape {self.data.shape}: scales of shape "
                f"{self.scales.shape} need uint8 {expected}"
            )
        _frozen(self.data, self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return (*self.scales.shape, self.dim)

    @property
    def codes(self) -> Bytes:
        """Unpacked codes, uint8 [..., dim]."""
        return unpack_bits(self.data, self.bits, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes and scales together."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def bits_per_coordinate(self) -> float:
        """Stored bits a coordinate, scales included."""
        return 8.0 * self.nbytes / max(1, math.prod(self.shape))


class MSEQuantizer:
    """Random rotation, one scalar codebook, one scale a vector.

    Parameters
    ----------
    dim : int
        Coordinates a vector, at least 2.
    bits : int
        Bits a coordinate, 1 to 8.
    rotation : {"haar", "hadamard"} or Rotation
        "haar" has the theorem behind it; "hadamard" costs O(dim log dim).
    scale : {"mse", "norm", "unbiased", "none"}
        What the stored scale is matched to: least squared error, equal norms, unbiased inner
        products (over Haar rotations), or the plain norm of the paper.
    seed : int
        Seed of the rotation.
    rounds : int
        Rounds of "hadamard".
    grid : {None, "int7", "int8", "e4m3"}
        See `tq_core.lloyd_max`.
    scale_dtype : dtype, optional
        Dtype of the scales: float16, float32 or float64. By default float64 for float64 input and
        float32 for the others. A scale too small for the dtype becomes 0 and so does its vector.
    compute_dtype : {"float64", "float32"}
        Precision of `encode`. "float32" is about three times as fast with a Haar rotation;
        a coordinate within rounding of a boundary, about one in 10⁵, may get the neighbouring code.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    >>> quantizer = MSEQuantizer(64, bits=4)
    >>> encoded = quantizer.encode(x)
    >>> encoded.nbytes  # 32 bytes of codes and 4 of scale a vector
    36000
    >>> error = np.sum((quantizer.decode(encoded) - x) ** 2) / np.sum(x**2)
    >>> bool(error < 0.0095)
    True
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        rotation: str | Rotation = "haar",
        scale: ScaleName = "mse",
        seed: int = 0,
        *,
        rounds: int = 3,
        grid: GridName | None = None,
        scale_dtype: DTypeLike | None = None,
        compute_dtype: DTypeLike = np.float64,
    ) -> None:
        check_scale(scale)
        self.codebook: Codebook = lloyd_max(dim, bits, grid)
        if self.codebook.dim is None:
            raise TQError(f"dim={dim}: a quantizer needs a finite dim >= 2")
        self.dim, self.bits, self.scale = self.codebook.dim, self.codebook.bits, scale
        self.rotation = make_rotation(rotation, self.dim, seed, rounds)
        self.scale_dtype = scale_dtype
        scale_dtype_for(np.zeros(0), scale_dtype)
        self.compute_dtype = np.dtype(compute_dtype)
        if self.compute_dtype not in _ORDINARY:
            raise TQError(f"compute_dtype={self.compute_dtype}: choose 'float32' or 'float64'")

    def __repr__(self) -> str:
        return (
            f"MSEQuantizer(dim={self.dim}, bits={self.bits}, rotation={self.rotation!r}, "
            f"scale={self.scale!r})"
        )

    def encode(self, x: ArrayLike) -> Encoded:
        """Encode vectors.

        Parameters
        ----------
        x : float16, float32 or float64 array [..., dim]
            Finite. Computed in ``compute_dtype``.

        Returns
        -------
        Encoded

        Raises
        ------
        TQError
            For another dtype or dim, a value that is not finite (its index is named), or a norm
            that the scale dtype cannot hold.
        """
        array = as_vectors(x, self.dim, finite=False)
        lead = array.shape[:-1]
        rows = array.reshape(math.prod(lead), self.dim)
        data = np.empty((len(rows), packed_size(self.dim, self.bits)), dtype=np.uint8)
        scales = np.empty(len(rows))
        for part in chunks(len(rows), self.dim, self.compute_dtype):
            codes, scales[part] = encode_rows(
                rows[part],
                self.rotation,
                self.codebook,
                self.scale,
                self.compute_dtype,
                whole=array,
            )
            data[part] = pack_bits(codes, self.bits)
        rounded = round_scales(
            scales.reshape(lead), scale_dtype_for(array, self.scale_dtype), SCALE_REMEDY
        )
        return Encoded(data.reshape(*lead, data.shape[-1]), rounded, self.dim, self.bits)

    def check(self, encoded: Encoded) -> None:
        """Raise unless ``encoded`` has the dim and bits of this quantizer."""
        if (encoded.dim, encoded.bits) != (self.dim, self.bits):
            raise TQError(
                f"encoded with dim={encoded.dim}, bits={encoded.bits}: this quantizer has "
                f"dim={self.dim}, bits={self.bits}; decode with the quantizer that encoded it"
            )

    def decode(self, encoded: Encoded, dtype: DTypeLike = np.float64) -> NDArray[np.floating]:
        """Decoded vectors [..., dim] of the given float dtype."""
        self.check(encoded)
        data = encoded.data.reshape(-1, encoded.data.shape[-1])
        scales = encoded.scales.reshape(-1).astype(np.float64)
        out = np.empty((len(scales), self.dim), dtype=dtype)
        for part in chunks(len(scales), self.dim):
            codes = unpack_bits(data[part], self.bits, self.dim)
            # Scaled after the rotation, so that no partial sum overflows.
            unit = self.rotation.inverse(self.codebook.decode(codes))
            out[part] = unit * scales[part, None]
        return out.reshape(encoded.shape)


@dataclass(frozen=True, eq=False)
class InnerProductEncoded:
    """Codes of `InnerProductQuantizer`.

    Attributes
    ----------
    mse : Encoded or None
        First stage at ``bits - 1`` bits with its norms; ``None`` at one bit.
    signs : uint8 array [..., ceil(dim / 8)]
        Packed signs of the sketched residual; 1 means non-negative.
    residual_norms : float array [...]
        Norms of the residuals.
    dim, bits : int
        Coordinates a vector and bits a coordinate, the sign included.
    """

    mse: Encoded | None
    signs: Bytes
    residual_norms: NDArray[np.floating]
    dim: int
    bits: int

    def __post_init__(self) -> None:
        _frozen(self.signs, self.residual_norms)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return (*self.residual_norms.shape, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, signs and both norms."""
        first = 0 if self.mse is None else self.mse.nbytes
        return first + self.signs.nbytes + self.residual_norms.nbytes

    @property
    def bits_per_coordinate(self) -> float:
        """Stored bits a coordinate, norms included."""
        return 8.0 * self.nbytes / max(1, math.prod(self.shape))


@lru_cache(maxsize=8)
def _gaussian_sketch(dim: int, seed: int) -> Float:
    sketch = standard_normals(seed, dim * dim).reshape(dim, dim)
    sketch.setflags(write=False)
    return sketch


class InnerProductQuantizer:
    """The paper's unbiased quantizer: ``bits - 1`` bits of least error, then a sign sketch.

    With the decoded vector x̃ of the first stage, its residual r = x - x̃ and a sketch matrix S, the
    decoded vector is ``x̃ + c ‖r‖ Sᵀ sign(S r)``. The constant c makes it
    unbiased over S:

    - Gaussian S (independent standard normals): ``c = √(π/2) / d``;
    - orthogonal S (Haar): ``c = 1 / (d E|X|)`` with X a coordinate of a uniform unit vector, which
      tends to ``√(π/2) / √d``.

    Parameters
    ----------
    dim : int
        At least 2.
    bits : int
        1 to 9, the sign included.
    rotation, seed, rounds, scale_dtype
        As in `MSEQuantizer`. The sketch has its own seed, derived from ``seed``.
    sketch : {"gaussian", "orthogonal"}
        Kind of S. "orthogonal" has the smaller variance.

    Notes
    -----
    An ``MSEQuantizer(dim, bits, scale="unbiased")`` has a smaller inner-product error at the same
    bits. This class is here as the reference of the paper's method.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        rotation: str | Rotation = "haar",
        seed: int = 0,
        *,
        sketch: Literal["gaussian", "orthogonal"] = "gaussian",
        rounds: int = 3,
        scale_dtype: DTypeLike | None = None,
    ) -> None:
        if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= 9:
            raise TQError(f"bits={bits}: needs 1 to 9, one of which is the sign of the sketch")
        if isinstance(dim, bool) or int(dim) != dim or dim < 2:
            raise TQError(f"dim={dim}: needs an integer >= 2")
        if sketch not in ("gaussian", "orthogonal"):
            raise TQError(f"sketch={sketch!r}: choose 'gaussian' or 'orthogonal'")
        self.dim, self.bits, self.sketch = int(dim), int(bits), sketch
        self.scale_dtype = scale_dtype
        scale_dtype_for(np.zeros(0), scale_dtype)
        self.stage: MSEQuantizer | None = None
        if self.bits > 1:
            self.stage = MSEQuantizer(
                self.dim,
                self.bits - 1,
                rotation,
                "none",
                seed,
                rounds=rounds,
                scale_dtype=scale_dtype,
            )
        self._sketch_seed = int(splitmix64(check_seed(seed), 1, start=2**32)[0])

    @property
    def sketch_matrix(self) -> Float:
        """S, float64 [dim, dim]."""
        if self.sketch == "gaussian":
            return _gaussian_sketch(self.dim, self._sketch_seed)
        return HaarRotation(self.dim, self._sketch_seed).matrix

    @property
    def constant(self) -> float:
        """Factor c that makes the sketch unbiased."""
        if self.sketch == "gaussian":
            return math.sqrt(math.pi / 2) / self.dim
        mean_magnitude = 2.0 * float(SphereCoordinate(self.dim).tail_first(0.0))
        return 1.0 / (self.dim * mean_magnitude)

    def encode(self, x: ArrayLike) -> InnerProductEncoded:
        """Encode vectors [..., dim]; input rules and errors as in `MSEQuantizer.encode`."""
        array = as_vectors(x, self.dim)
        lead = array.shape[:-1]
        rows = array.reshape(math.prod(lead), self.dim)
        signs = np.empty((len(rows), packed_size(self.dim, 1)), dtype=np.uint8)
        norms = np.empty(len(rows))
        first = None if self.stage is None else self.stage.encode(rows)
        for part in chunks(len(rows), self.dim):
            residual = rows[part].astype(np.float64)
            if self.stage is not None and first is not None:
                chunk = Encoded(first.data[part], first.scales[part], self.dim, self.bits - 1)
                residual = residual - self.stage.decode(chunk)
            scaled, exponent = normalise(residual)
            signs[part] = pack_bits((scaled @ self.sketch_matrix.T >= 0.0).astype(np.uint8), 1)
            norm = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
            with np.errstate(over="ignore"):
                norms[part] = np.ldexp(norm, exponent)
        rounded = round_scales(
            norms.reshape(lead), scale_dtype_for(array, self.scale_dtype), SCALE_REMEDY
        )
        if first is not None:
            first = Encoded(
                first.data.reshape(*lead, first.data.shape[-1]),
                first.scales.reshape(lead),
                self.dim,
                self.bits - 1,
            )
        return InnerProductEncoded(
            first, signs.reshape(*lead, signs.shape[-1]), rounded, self.dim, self.bits
        )

    def decode(
        self, encoded: InnerProductEncoded, dtype: DTypeLike = np.float64
    ) -> NDArray[np.floating]:
        """Decoded vectors [..., dim]: unbiased estimates over sketches."""
        if (encoded.dim, encoded.bits) != (self.dim, self.bits):
            raise TQError(
                f"encoded with dim={encoded.dim}, bits={encoded.bits}: this quantizer has "
                f"dim={self.dim}, bits={self.bits}; decode with the quantizer that encoded it"
            )
        signs = encoded.signs.reshape(-1, encoded.signs.shape[-1])
        norms = encoded.residual_norms.reshape(-1).astype(np.float64)
        if self.stage is None or encoded.mse is None:
            out = np.zeros((len(norms), self.dim), dtype=dtype)
        else:
            out = self.stage.decode(encoded.mse, dtype).reshape(len(norms), self.dim)
        for part in chunks(len(norms), self.dim):
            sign = 2.0 * unpack_bits(signs[part], 1, self.dim) - 1.0
            sketch = (sign @ self.sketch_matrix) * self.constant
            out[part] += (sketch * norms[part, None]).astype(out.dtype)
        return out.reshape(encoded.shape)
