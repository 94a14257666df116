from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError, encode_record, unpack_record
from tq_kernels import KVFormat, decode_tokens, encode_tokens
from tq_kernels.quantize import quantize, to_half

Kind = Literal["k", "v"]

#: Largest distance of a coordinate of a unit vector to a boundary at which float32 may choose the
#: other side: rounding of the product with the rotation, a few times 2**-24.
DISTANCE = 2e-6

FORMATS = st.builds(
    KVFormat,
    st.sampled_from(range(16, 257, 16)),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([2, 3, 4, 8]),
    rotation=st.sampled_from(["hadamard", "haar"]),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 3),
    scale=st.sampled_from(["mse", "norm", "unbiased", "none"]),
)


def by_core(x: np.ndarray, fmt: KVFormat) -> tuple[np.ndarray, ...]:
    """Codes and scales (k_codes, v_codes, k_scales, v_scales) of [rows, head_dim], by tq-core."""
    rows = len(x)
    padded = np.zeros((-(-rows // fmt.page_size), fmt.page_size, fmt.head_dim))
    padded.reshape(-1, fmt.head_dim)[:rows] = x
    record = encode_record(padded, padded, fmt.layout, rotation=fmt.core_rotation, scale=fmt.scale)
    parts = unpack_record(record, fmt.layout)
    return tuple(p.reshape(-1, *p.shape[2:])[:rows] for p in parts)


@given(FORMATS.filter(lambda f: f.rotation == "hadamard"), st.integers(0, 2**32))
def test_float64_equals_tq_core_bit_for_bit(
    vector_families: Callable[..., np.ndarray], fmt: KVFormat, seed: int
) -> None:
    x = vector_families(np.random.default_rng(seed), fmt.head_dim)
    expected = by_core(x, fmt)
    for n, kind in enumerate(("k", "v")):
        codes, scales = quantize(torch.from_numpy(x), fmt, kind)
        np.testing.assert_array_equal(codes.numpy(), expected[n])
        np.testing.assert_array_equal(scales.numpy(), expected[2 + n])


@settings(max_examples=20)
@given(FORMATS.filter(lambda f: f.rotation == "haar"), st.integers(0, 2**32))
def test_float64_haar_equals_the_definition(
    check_quantized: Callable[..., None],
    vector_families: Callable[..., np.ndarray],
    fmt: KVFormat,
    seed: int,
) -> None:
    # A matrix product rounds differently in NumPy and in PyTorch.
    x = torch.from_numpy(vector_families(np.random.default_rng(seed), fmt.head_dim))
    for kind in ("k", "v"):
        check_quantized(x, *quantize(x, fmt, kind), fmt, kind, 1e-13)


@settings(max_examples=50)
@given(
    FORMATS,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**32),
)
def test_float32_and_below_equal_the_definition(
    check_quantized: Callable[..., None],
    vector_families: Callable[..., np.ndarray],
    fmt: KVFormat,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x = torch.from_numpy(vector_families(np.random.default_rng(seed), fmt.head_dim)).to(dtype)
    for kind in ("k", "v"):
        check_quantized(x, *quantize(x, fmt, kind), fmt, kind, DISTANCE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sweep(
    check_quantized: Callable[..., None],
    vector_families: Callable[..., np.ndarray],
    any_device: str,
    dtype: torch.dtype,
    dim: int,
    bits: int,
) -> None:
    fmt = KVFormat(dim, bits, bits)
    rng = np.random.default_rng(bits)
    x = torch.from_numpy(np.stack([vector_families(rng, dim) for _ in range(4)])).to(dtype)
    codes, scales = quantize(x.to(any_device), fmt, "k")
    assert codes.shape == x.shape and codes.device.type == any_device
    assert scales.shape == x.shape[:-1] and scales.dtype == torch.float16
    check_quantized(x, codes, scales, fmt, "k", DISTANCE)
    dense = x[:, :4].double().numpy().reshape(-1, dim)
    same = codes[:, :4].cpu().numpy().reshape(-1, dim) == by_core(dense, fmt)[0]
    assert np.mean(~same) < 2e-3


@given(FORMATS, st.integers(-100, 100), st.integers(0, 2**32))
def test_a_power_of_two_changes_only_the_scale(fmt: KVFormat, power: int, seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, fmt.head_dim))).float()
    codes, scales = quantize(x, fmt, "k")
    scaled = x * 2.0**power
    if float(scaled.abs().max()) < 1e3:
        again, small = quantize(scaled, fmt, "k")
        assert torch.equal(again, codes)
        exact = scales.double() * 2.0**power
        assert torch.all((small.double() - exact).abs() <= 2.0**-25 + exact * 2.0**-10)


def test_float32_subnormals_have_the_codes_of_normals() -> None:
    fmt = KVFormat(64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half().float()
    codes, _ = quantize(x, fmt, "k")
    tiny, scales = quantize(x * 2.0**-135, fmt, "k")
    assert torch.equal(tiny, codes) and not scales.any()


@given(st.floats(-70000, 70000), st.integers(-40, 0))
def test_to_half_rounds_once(value: float, power: int) -> None:
    x = np.float64(value) * 2.0**power
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert to_half(torch.tensor(x, dtype=torch.float64)).item() == float(expected)


def test_to_half_of_halfway_cases() -> None:
    """Rounding by way of float32 would go wrong just beside the middle of two fp16 numbers."""
    middle = 1.0 + 2.0**-11
    x = np.array([middle, middle + 2.0**-40, middle - 2.0**-40, 3 * 2.0**-25, 2.0**-25, -middle])
    got = to_half(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got, x.astype(np.float16))


@pytest.mark.parametrize("kind", ["k", "v"])
def test_decode_inverts_up_to_the_distortion(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    for bits in (2, 3, 4, 8):
        fmt = KVFormat(96, bits, bits, scale="mse")
        x = torch.from_numpy(rng.normal(size=(200, 96)))
        back = decode_tokens(encode_tokens(x, fmt, kind), fmt, kind, torch.float64)
        ratio = float(((back - x) ** 2).sum() / (x**2).sum())
        expected = fmt.k_codebook.mse
        # At 8 bits most of the error is in rare coordinates beyond the last level.
        assert 0.8 * expected < ratio < (1.3 if bits == 8 else 1.05) * expected


@given(FORMATS, st.integers(0, 2**32))
def test_decode_equals_tq_core(fmt: KVFormat, seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, fmt.head_dim)))
    for kind, book in (("k", fmt.k_codebook), ("v", fmt.v_codebook)):
        codes, scales = quantize(x, fmt, kind)
        c = book.centroids[codes.numpy()] * scales.double().numpy()[..., None]
        expected = fmt.core_rotation.inverse(c)
        tokens = encode_tokens(x, fmt, kind)
        assert tokens.nbytes == 6 * (fmt.head_dim * book.bits // 8 + 2)
        for dtype, error in ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.float16, 1e-3)):
            back = decode_tokens(tokens, fmt, kind, dtype)
            assert back.dtype == dtype
            norm = np.linalg.norm(expected, axis=-1, keepdims=True)
            assert np.max(np.abs(back.double().numpy() - expected) / norm) < error


def test_token_codes_move_together() -> None:
    fmt = KVFormat(32, 3, 3)
    tokens = encode_tokens(torch.randn(2, 6, 32), fmt, "k")
    assert tokens.tokens == 6
    joined = tokens.narrow(0, 2).cat(tokens.narrow(2, 6))
    for a, b in zip((*joined.planes, joined.scales), (*tokens.planes, tokens.scales), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tokens.map(lambda t: t[1:]).scales, tokens.scales[1:])


def test_zero_vectors_and_no_vectors() -> None:
    for bits in (2, 3, 4, 8):
        fmt = KVFormat(64, bits, bits)
        codes, scales = quantize(torch.zeros(2, 64), fmt, "v")
        assert not scales.any() and (codes == 2 ** (bits - 1)).all()
        codes, scales = quantize(torch.zeros(0, 3, 64), fmt, "v")
        assert codes.shape == (0, 3, 64) and codes.dtype == torch.uint8
        assert scales.shape == (0, 3) and scales.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 32, dtype=dtype)
    x[1, 2, 5] = bad
    with pytest.raises(TQError, match=r"k\[1, 2, 5\] is -?(nan|inf)"):
        quantize(x, KVFormat(32), "k")


def test_scale_above_fp16_and_other_dtypes() -> None:
    x = torch.zeros(2, 32)
    x[1] = 1e5
    with pytest.raises(TQError, match=r"vector v\[1\].*65504"):
        quantize(x, KVFormat(32, scale="none"), "v")
    with pytest.raises(TQError, match=r"int64.*float16"):
        quantize(x.long(), KVFormat(32), "k")


def spread(dim: int = 64) -> torch.Tensor:
    return torch.randn(1, 2, 200, dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "share"), [(2, 1.0), (3, 0.97), (4, 0.9)])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_a_search_leaves_smaller_angles(bits: int, share: float, kind: Kind) -> None:
    fmt, x = KVFormat(64, bits, bits), spread()
    plain, found = (
        decode_tokens(encode_tokens(x, fmt, kind, search=search), fmt, kind)
        for search in (False, True)
    )
    before, after = (1 - torch.cosine_similarity(x, y, dim=-1) for y in (plain, found))
    assert (after <= before + 1e-5).all()
    assert after.mean() < share * before.mean()
    product = (x * found).sum(-1) / x.square().sum(-1)
    torch.testing.assert_close(product, torch.ones_like(product), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_search_in_a_metric_leaves_less_of_its_error(bits: int) -> None:
    fmt, x = KVFormat(64, bits, bits), spread()
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(2, 8, 64, generator=generator)
    metric = factors.mT @ factors  # eight directions of a head matter

    def errors(**options: object) -> torch.Tensor:
        y = decode_tokens(encode_tokens(x, fmt, "k", **options), fmt, "k")  # type: ignore[arg-type]
        return torch.einsum("bhti,hij,bhtj->bht", y - x, metric, y - x)

    plain, other = errors(), errors(search=True, metric=metric.flip(0))
    found = errors(search=True, metric=metric)
    assert (found <= plain * 1.02 + 1e-6).all()  # but for the rounding of the scales
    assert found.mean() < 0.6 * plain.mean()
    assert found.mean() < 0.7 * other.mean()
    double = encode_tokens(x.double(), fmt, "k", search=True, metric=metric)
    assert (
        double.planes[0] == encode_tokens(x, fmt, "k", search=True, metric=metric).planes[0]
    ).float().mean() > 0.99


def test_an_even_metric_is_none() -> None:
    fmt, x = KVFormat(64, 3, 3), spread()
    even = 3 * torch.eye(64).expand(2, 64, 64)
    one, two = (encode_tokens(x, fmt, "v", search=True, metric=m) for m in (None, even))
    same = (one.scales == two.scales).float().mean()
    assert same > 0.98  # but for ties within rounding


def test_a_search_of_zeros_and_wrong_metrics() -> None:
    fmt = KVFormat(64, 4, 4)
    codes = encode_tokens(torch.zeros(1, 2, 3, 64), fmt, "k", search=True)
    assert torch.equal(decode_tokens(codes, fmt, "k"), torch.zeros(1, 2, 3, 64))
    for x, shape in (
        (spread(), (1, 64, 64)),
        (spread(), (64, 64)),
        (torch.zeros(5, 64), (2, 64, 64)),
    ):
        with pytest.raises(TQError, match="metric has shape"):
            encode_tokens(x, fmt, "k", search=True, metric=torch.zeros(shape))
    with pytest.raises(TQError, match="search=True"):
        encode_tokens(spread(), fmt, "k", metric=torch.zeros(2, 64, 64))
