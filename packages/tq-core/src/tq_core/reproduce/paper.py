"""Numbers that the paper prints, to be shown beside measured ones.

Some are rounded hard or carry a rounding forward; ``docs/research.md`` explains which.
"""

from __future__ import annotations

__all__ = ["INNER_PRODUCT", "MSE", "TIMES"]

# Section 3.1: mean squared error of a unit vector, by bits.
MSE = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
# Section 3.2: variance of the inner product of unit vectors times the dimension, by bits.
INNER_PRODUCT = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}
# Table 2: seconds to quantize a data set at 4 bits, by dimension; its size is not stated.
TIMES = {
    "product quantization": {200: 37.04, 1536: 239.75, 3072: 494.42},
    "RaBitQ": {200: 597.25, 1536: 2267.59, 3072: 3957.19},
    "TurboQuant": {200: 0.0007, 1536: 0.0013, 3072: 0.0021},
}
