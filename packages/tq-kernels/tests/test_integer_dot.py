from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, attend_codes
from tq_kernels.expand import expand
from tq_kernels.integer_dot import LARGEST, dot_half_integers, to_digits
from tq_kernels.quantize import encode_tokens


@given(st.integers(1, 9), st.integers(1, 70), st.integers(-30, 30), st.integers(0, 2**32))
def test_digits_are_the_nearest_integers(rows, columns, exponent, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, rows, columns, generator=rng) * 2.0**exponent
    d = to_digits(x)
    high, low = d.digits.double().chunk(2, dim=-2)
    whole = 256 * high + low
    assert float(whole.abs().max()) == LARGEST
    assert torch.equal(whole.sum(-1, keepdim=True), d.total.double())
    error = (whole * d.unit - x).abs() / d.unit
    assert float(error.max()) <= 0.51


@given(st.integers(1, 5), st.sampled_from([16, 48, 2048]), st.integers(1, 40), st.booleans())
def test_products_are_those_of_the_rounded_rows(rows, columns, n, extreme):
    rng = torch.Generator().manual_seed(rows * n)
    x = torch.randn(2, 3, rows, columns, generator=rng)
    numbers = torch.randint(-128, 128, (2, 3, columns, n), generator=rng, dtype=torch.int8)
    if extreme:  # the largest sums there are
        x, numbers = torch.ones_like(x), torch.full_like(numbers, -128)
    d = to_digits(x)
    high, low = d.digits.double().chunk(2, dim=-2)
    want = ((256 * high + low) * d.unit) @ (numbers.double() + 0.5)
    largest = float(want.abs().max()) + columns * 64.0
    for got in (dot_half_integers(d, numbers), dot_half_integers(d, numbers.mT.clone().mT)):
        assert float((got - want).abs().max()) <= 1e-6 * largest


def test_a_row_of_zeros_and_a_row_of_nan():
    x = torch.tensor([[[[0.0, 0.0], [1.0, torch.nan]]]])
    numbers = torch.ones(1, 1, 2, 3, dtype=torch.int8)
    got = dot_half_integers(to_digits(x), numbers)[0, 0]
    assert torch.equal(got[0], torch.zeros(3)) and bool(got[1].isnan().all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_int8_numbers_are_one_half_less(bits, kind):
    fmt = KVFormat(80, bits, bits)
    planes = encode_tokens(torch.randn(2, 11, 80), fmt, kind).planes
    for view in (planes, tuple(p[:, 3:8] for p in planes), tuple(p.mT.clone().mT for p in planes)):
        small = expand(view, fmt, kind, torch.int8)
        assert small.dtype == torch.int8
        assert torch.equal(small + 0.5, expand(view, fmt, kind, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_with_16_bit_queries_takes_integers(dtype):
    fmt = KVFormat(64, 4, 3)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 3, 64, generator=rng).to(dtype)
    k, v = torch.randn(2, 1, 2, 700, 64, generator=rng)
    keys, values = encode_tokens(k * 2, fmt, "k"), encode_tokens(v, fmt, "v")
    exact, total = attend_codes(q.double(), keys, values, fmt)
    default, lse = attend_codes(q, keys, values, fmt, chunk=256)
    same, _ = attend_codes(q, keys, values, fmt, chunk=256, dtype=torch.int8)
    assert torch.equal(default, same)
    fine, fine_lse = attend_codes(q.float(), keys, values, fmt, chunk=256, dtype=torch.int8)
    largest = float(exact.abs().max())
    assert float((fine - exact).abs().max()) < 3e-4 * largest
    assert float((fine_lse - total).abs().max()) < 3e-4
    assert float((lse - total).abs().max()) < 3e-4
    # What is left is the rounding of the output.
    error = float((default.double() - exact).abs().max())
    assert error < (0.5 * torch.finfo(dtype).eps + 3e-4) * largest


def test_integers_need_the_cpu():
    fmt = KVFormat(16)
    codes = encode_tokens(torch.randn(1, 1, 4, 16), fmt, "k")
    with pytest.raises(TQError, match="int8 on meta"):
        attend_codes(torch.zeros(1, 1, 1, 16, device="meta"), codes, codes, fmt, dtype=torch.int8)
