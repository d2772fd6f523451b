"""convert/affine.py against mx.quantize and mx.dequantize on MLX's CPU, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.affine import BITS, GROUP_SIZES, Packed, dequantize, quantize
from ivcore.floats import BLOCK, finite, narrow, widen

mx = pytest.importorskip("mlx.core")

DTYPES = ("F32", "F16", "BF16")
# The largest numbers, and the unit of denormals.
LARGEST = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "BF16": (2 - 2**-7) * 2.0**127}
DENORMAL = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}

bit_widths = st.sampled_from(BITS)
group_sizes = st.sampled_from(GROUP_SIZES)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)


def to_mx(stored: np.ndarray, dtype: str) -> mx.array:
    return mx.array(stored).view(mx.bfloat16) if dtype == "BF16" else mx.array(stored)


def from_mx(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def assert_same_bits(found: np.ndarray, expected: np.ndarray, dtype: str, what: str) -> None:
    """Every bit, but for a NaN's sign and payload, which are the processor's."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    if dtype != "U32":
        nan = np.isnan(widen(expected, dtype))
        np.testing.assert_array_equal(np.isnan(widen(found, dtype)), nan, what)
        found, expected = found[~nan], expected[~nan]
    bits = f"u{found.itemsize}"
    np.testing.assert_array_equal(found.view(bits), expected.view(bits), what)


def check(stored: np.ndarray, bits: int, group_size: int, dtype: str) -> np.ndarray:
    """Quantise and dequantise here and in MLX, compare all, and return what came back as float32."""
    setting = {"group_size": group_size, "bits": bits, "stream": mx.cpu}
    reference = mx.quantize(to_mx(stored, dtype), **setting)
    packed = quantize(stored, bits, group_size, dtype)
    for name, found, expected in zip(Packed._fields, packed, reference, strict=True):
        assert_same_bits(found, from_mx(expected), "U32" if name == "weight" else dtype, name)
    dense = dequantize(packed, bits, group_size, dtype)
    assert_same_bits(dense, from_mx(mx.dequantize(*reference, **setting)), dtype, "dequantized")
    return widen(dense, dtype)


@given(bits=bit_widths, group_size=group_sizes, dtype=dtypes, rows=st.integers(1, 5), width=st.integers(1, 4),
       exponent=st.integers(-46, 38), center=st.floats(-4, 4), seed=seeds)  # fmt: skip
def test_normal_numbers_of_any_magnitude(bits: int, group_size: int, dtype: str, rows: int, width: int,
                                         exponent: int, center: float, seed: int) -> None:  # fmt: skip
    values = np.random.default_rng(seed).standard_normal((rows, width * group_size)) + center
    values = np.clip(values * 10.0**exponent, -LARGEST[dtype], LARGEST[dtype]).astype(np.float32)
    check(narrow(values, dtype), bits, group_size, dtype)


@given(bits=bit_widths, group_size=group_sizes, dtype=dtypes, rows=st.integers(1, 4), seed=seeds)
def test_random_bits_of_all_finite_numbers(bits: int, group_size: int, dtype: str, rows: int, seed: int) -> None:
    count = rows * group_size
    raw = np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)
    stored = raw.view(np.float32) if dtype == "F32" else raw.astype(np.uint16)
    stored = stored.view(np.float16) if dtype == "F16" else stored
    stored[~np.isfinite(widen(stored, dtype))] = 0
    check(stored.reshape(rows, group_size), bits, group_size, dtype)


@given(bits=bit_widths, group_size=group_sizes, dtype=dtypes, seed=seeds)
def test_codes_halfway_between_two_round_to_even(bits: int, group_size: int, dtype: str, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1  # a scale of 1
    values = np.random.default_rng(seed).integers(2 * low, 2 * high, (2, group_size), endpoint=True) / 2
    values[:, 0], values[:, -1] = low, high
    packed = quantize(narrow(values.astype(np.float32), dtype), bits, group_size, dtype)
    assert np.all(widen(packed.scales, dtype) == 1)
    check(narrow(values.astype(np.float32), dtype), bits, group_size, dtype)


CONSTANTS = [0.0, -0.0, 1.0, -1.0, 0.3, -0.3, 1e-6, 1e-7, -1e-7, 6e-8, 5e-8, -5e-8, 1e-8, 1e-40, -1e-40, 3e4, -3e4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups(bits: int, group_size: int, dtype: str) -> None:
    # The numbers about 5e-8, half the smallest scale, are where zero steps and one step part.
    extremes = [LARGEST[dtype], -LARGEST[dtype], DENORMAL[dtype], -DENORMAL[dtype]]
    values = np.repeat(np.array([*CONSTANTS, *extremes], np.float32)[:, None], group_size, axis=1)
    check(narrow(values, dtype), bits, group_size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_groups_made_to_go_wrong(bits: int, group_size: int, dtype: str) -> None:
    random = np.random.default_rng(bits * group_size)
    normal = random.standard_normal(group_size)
    size, largest, denormal = np.abs(normal), LARGEST[dtype], DENORMAL[dtype]

    def with_first(group: np.ndarray, *first: float) -> np.ndarray:
        return np.concatenate([first, group[len(first) :]])

    groups = {
        "one outlier": with_first(0.01 * normal, 100),
        "one negative outlier": with_first(0.01 * normal, -100),
        "one largest number": with_first(0.01 * normal, largest),
        "one largest negative number": with_first(0.01 * normal, -largest),
        "one number among zeros": with_first(np.zeros(group_size), 1e-3),
        "one negative number among zeros": with_first(np.zeros(group_size), -1e-3),
        "one denormal among zeros": with_first(np.zeros(group_size), denormal),
        "denormals": random.integers(-500, 500, group_size) * denormal,
        "positive denormals": random.integers(0, 100, group_size) * denormal,
        "negative denormals": random.integers(-100, 0, group_size) * denormal,
        "all positive": size,
        "all negative": -size,
        "positive with a negative zero": with_first(size, -0.0),
        "negative with a negative zero": with_first(-size, -0.0),
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "negative zeros among others": np.where(normal > 1, normal, -0.0),
        "extremes of one magnitude": with_first(np.clip(normal, -1, 1), -1, 1),
        "extremes of one magnitude, turned": with_first(np.clip(normal, -1, 1), 1, -1),
        "extremes alone": np.where(normal > 0, 1.0, -1.0),
        "evenly spaced and symmetric": np.linspace(-1, 1, group_size),
        "far from zero": 1000 + normal,
        "far below zero": -1000 + normal,
        "far from zero, all but equal": 1 + 2e-3 * (normal > 0),
        "no step from zero": 1e-8 * np.clip(normal, -4, 4),
        "about one step from zero": 5e-8 * np.clip(normal, -2, 2),
        "a range of about the smallest scale": 1e-7 * 2**bits * normal,
        "both largest numbers": np.where(normal > 0, largest, -largest),
        "up to both largest numbers": with_first(largest / 8 * np.clip(normal, -4, 4), largest, -largest),
        "a range just not beyond float32": with_first(largest / 16 * np.clip(normal, -4, 4), largest / 2, -largest / 2),
        "up to the largest number": largest * np.abs(normal) / size.max(),
        "down to the largest negative number": -largest * np.abs(normal) / size.max(),
    }
    dense = {}
    for name, group in groups.items():
        stored = narrow(group.astype(np.float32)[None], dtype)
        assert finite(stored, dtype), name
        dense[name] = check(stored, bits, group_size, dtype)
    # MLX keeps the extreme of larger magnitude exactly, so that an outlier is not lost.
    assert dense["one outlier"].max() == 100 and dense["one negative outlier"].min() == -100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_of_several_blocks_and_a_part_of_one(bits: int, dtype: str) -> None:
    values = np.random.default_rng(bits).standard_normal((45, 128 * 97)).astype(np.float32)
    assert values.size > 2 * BLOCK and values.size % BLOCK
    stored = narrow(values * 0.02, dtype)
    for group_size in (32, 128):
        check(stored, bits, group_size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_and_biases_of_any_size_dequantise_as_in_mlx(dtype: str) -> None:
    # A folder from elsewhere may hold scales that no quantiser here would have chosen.
    random = np.random.default_rng(9)
    magnitudes = 2.0 ** random.uniform(-30, 14, (2, 40, 3)) * random.choice([-1, 1], (2, 40, 3))
    scales, biases = narrow(magnitudes.astype(np.float32), dtype)
    for bits in BITS:
        weight = random.integers(0, 2**32, (40, 3 * 64 * bits // 32), np.uint32)
        parts = (mx.array(weight), to_mx(scales, dtype), to_mx(biases, dtype))
        expected = mx.dequantize(*parts, group_size=64, bits=bits, stream=mx.cpu)
        found = dequantize(Packed(weight, scales, biases), bits, 64, dtype)
        assert_same_bits(found, from_mx(expected), dtype, f"{bits} bits")


def test_threads_working_at_once_do_not_disturb_each_other() -> None:
    values = np.random.default_rng(1).standard_normal((16, 64, 512)).astype(np.float32)
    alone = [quantize(block, 4, 64) for block in values]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda block: quantize(block, 4, 64), values))
    for one, other in zip(alone, together, strict=True):
        for found, expected in zip(other, one, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_transposed_matrix_is_quantised_in_its_own_order() -> None:
    values = np.random.default_rng(2).standard_normal((64, 32)).astype(np.float32)
    check(np.asfortranarray(values), 4, 32, "F32")


def test_a_matrix_without_rows_has_no_codes() -> None:
    packed = quantize(np.empty((0, 128), np.float32), 4, 64)
    assert [part.shape for part in packed] == [(0, 16), (0, 2), (0, 2)]
    assert dequantize(packed, 4, 64, "F32").shape == (0, 128)


def test_columns_that_are_not_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="96 columns are not whole groups of 64"):
        quantize(np.zeros((2, 96), np.float32), 4, 64)
    packed = quantize(np.zeros((2, 96), np.float32), 4, 32)
    with pytest.raises(ValueError, match="96 columns are not whole groups of 64"):
        dequantize(packed, 4, 64, "F32")


@pytest.mark.parametrize(("bits", "group_size"), [(1, 64), (7, 64), (16, 64), (4, 16), (4, 256)])
def test_bits_and_groups_that_mlx_has_not_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits in groups of {group_size}"):
        quantize(np.zeros((1, 256), np.float32), bits, group_size)
