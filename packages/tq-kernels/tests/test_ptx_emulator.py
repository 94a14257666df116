"""The emulation of PTX: that of the decode kernels is in ``test_decode_plan``."""

from __future__ import annotations

import numpy as np
from tq_kernels.nvidia import ptx_emulator


def test_byte_permutation():
    """``prmt`` as the manual has it: the sign of the chosen byte where bit 3 is set."""
    a, b = np.uint32(0x83020100), np.uint32(0x07060504)
    got = ptx_emulator.run("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, np.uint32(0x0BF3)])
    assert (got[0] == 0x00FF0083).all()
