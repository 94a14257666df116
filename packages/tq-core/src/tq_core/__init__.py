"""TurboQuant in NumPy: coordinate laws, codebooks, rotations, quantizers and the page format."""

from __future__ import annotations

from tq_core import bounds
from tq_core.balance import balancing_matrix, balancing_scales
from tq_core.codebook import Codebook, gaussian_codebook, lloyd_max
from tq_core.distribution import (
    CoordinateLaw,
    GaussianCoordinate,
    SphereCoordinate,
    coordinate_law,
)
from tq_core.errors import ConvergenceError, TQError
from tq_core.outliers import OutlierEncoded, OutlierQuantizer, outlier_channels, outlier_count
from tq_core.packing import pack_bits, packed_size, unpack_bits
from tq_core.pages import (
    PageLayout,
    decode_record,
    encode_record,
    pack_keys,
    pack_record,
    pack_values,
    page_codebook,
    unpack_keys,
    unpack_record,
    unpack_values,
)
from tq_core.quantizer import (
    Encoded,
    InnerProductEncoded,
    InnerProductQuantizer,
    MSEQuantizer,
)
from tq_core.rotation import HaarRotation, HadamardRotation, Rotation, make_rotation
from tq_core.search import CodeIndex

__all__ = [
    "CodeIndex",
    "Codebook",
    "ConvergenceError",
    "CoordinateLaw",
    "Encoded",
    "GaussianCoordinate",
    "HaarRotation",
    "HadamardRotation",
    "InnerProductEncoded",
    "InnerProductQuantizer",
    "MSEQuantizer",
    "OutlierEncoded",
    "OutlierQuantizer",
    "PageLayout",
    "Rotation",
    "SphereCoordinate",
    "TQError",
    "balancing_matrix",
    "balancing_scales",
    "bounds",
    "coordinate_law",
    "decode_record",
    "encode_record",
    "gaussian_codebook",
    "lloyd_max",
    "make_rotation",
    "outlier_channels",
    "outlier_count",
    "pack_bits",
    "pack_keys",
    "pack_record",
    "pack_values",
    "packed_size",
    "page_codebook",
    "unpack_bits",
    "unpack_keys",
    "unpack_record",
    "unpack_values",
]
