"""convert/floats.py against torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ivcore.floats import BLOCK, cast, finite, narrow, widen
from ivcore.shards import STORED_AS

torch = pytest.importorskip("torch")

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16, "F64": np.uint64}
ALL_16 = np.arange(2**16, dtype=np.uint16)
# float32 bits that rounding to 16 bits can get wrong.
EDGES = np.array(
    [
        *(0x0000_0000, 0x8000_0000, 0x0000_0001, 0x8000_0001, 0x0000_7FFF, 0x0000_8000, 0x0000_8001, 0x0001_8000),
        *(0x007F_FFFF, 0x0080_0000, 0x007F_8000, 0x007F_7FFF),  # about the least normal float32
        *(0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F80_7FFF, 0xBF80_8000, 0xBF81_8000),  # halfway in BF16
        *(0x3F80_1000, 0x3F80_3000, 0x3F80_1001, 0x3F80_0FFF, 0xBF80_1000, 0xBF80_3000),  # halfway in F16
        *(0x7F7F_FFFF, 0x7F7F_7FFF, 0x7F7F_8000, 0xFF7F_8000, 0x7F7F_0000),  # BF16's overflow
        *(0x477F_E000, 0x477F_EFFF, 0x477F_F000, 0xC77F_F000, 0x4780_0000),  # F16's overflow: 65504, 65520
        *(0x3300_0000, 0x3300_0001, 0x32FF_FFFF, 0x3380_0000, 0x33C0_0000),  # F16's least denormal and half of it
        *(0x387F_C000, 0x387F_E000, 0x387F_DFFF, 0x3880_0000),  # from F16's largest denormal to its least normal
        *(0x7F80_0000, 0xFF80_0000),
    ],
    np.uint32,
).view(np.float32)
NANS = np.array([0x7F80_0001, 0xFF80_0001, 0x7FC0_0000, 0xFFC0_0000, 0x7FFF_FFFF, 0xFFFF_FFFF], np.uint32)

any_float32 = arrays.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**32 - 1))


def to_torch(stored: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(stored.view(np.int16) if dtype == "BF16" else stored).view(TORCH[dtype])


def from_torch(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else tensor.numpy()


def is_nan(stored: np.ndarray, dtype: str) -> np.ndarray:
    return to_torch(stored, dtype).isnan().numpy()


def assert_same_numbers(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """The same bits; a NaN's payload is nobody's promise."""
    assert found.dtype == STORED_AS[dtype] and found.shape == expected.shape
    nan = is_nan(expected, dtype)
    np.testing.assert_array_equal(is_nan(found, dtype), nan)
    np.testing.assert_array_equal(found.view(BITS[dtype])[~nan], expected.view(BITS[dtype])[~nan])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern_widens_as_in_torch_and_narrows_back_to_itself(dtype: str) -> None:
    stored = ALL_16.view(STORED_AS[dtype])
    wide = widen(stored, dtype)
    assert_same_numbers(wide, to_torch(stored, dtype).float().numpy(), "F32")
    assert_same_numbers(narrow(wide, dtype), stored, dtype)
    assert widen(stored, dtype, out := np.empty(stored.shape, np.float32)) is out
    assert out.tobytes() == wide.tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_the_halfway_points_between_neighbours_and_what_is_beside_them_round_as_in_torch(dtype: str) -> None:
    values = widen(ALL_16.view(STORED_AS[dtype]), dtype)
    values = values[np.isfinite(values)]
    halfway = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    for points in (halfway, np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf))):
        expected = from_torch(torch.from_numpy(points).to(TORCH[dtype]), dtype)
        assert_same_numbers(narrow(points, dtype), expected, dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_denormals_ties_and_overflow_round_as_in_torch(dtype: str) -> None:
    expected = from_torch(torch.from_numpy(EDGES).to(TORCH[dtype]), dtype)
    assert_same_numbers(narrow(EDGES, dtype), expected, dtype)


@given(bits=any_float32)
def test_any_float32_rounds_as_in_torch(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    for dtype in ("F16", "BF16", "F32"):
        assert_same_numbers(narrow(values, dtype), from_torch(torch.from_numpy(values).to(TORCH[dtype]), dtype), dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_nan_stays_nan_at_any_place_of_any_block(dtype: str) -> None:
    values = np.ones(2 * BLOCK + 5, np.float32)
    places = [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 4]
    values[places] = NANS.view(np.float32)
    assert is_nan(narrow(values, dtype), dtype).nonzero()[0].tolist() == places


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "F64"])
def test_a_cast_gives_what_torch_gives(source: str, target: str) -> None:
    values = np.random.default_rng(3).standard_normal(BLOCK + 77) * 10.0 ** np.linspace(-50, 45, BLOCK + 77)
    with np.errstate(over="ignore"):
        given_ = torch.from_numpy(np.concatenate([values, EDGES])).to(TORCH[source])
    found = cast(from_torch(given_, source).reshape(-1, 1), source, target)
    assert_same_numbers(found, from_torch(given_.to(TORCH[target]), target).reshape(-1, 1), target)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_cast_to_the_same_dtype_keeps_every_bit(dtype: str) -> None:
    stored = (NANS if dtype == "F32" else ALL_16).view(STORED_AS[dtype])
    assert cast(stored, dtype, dtype) is stored


def test_nothing_is_stored_as_float64() -> None:
    with pytest.raises(ValueError, match="F64"):
        narrow(EDGES, "F64")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    values = np.full(shape, 1.5, np.float32)
    for dtype in ("F32", "F16", "BF16"):
        stored = narrow(values, dtype)
        assert stored.shape == shape and np.array_equal(widen(stored, dtype), values)
        assert cast(stored, dtype, "BF16").shape == shape
        assert finite(stored, dtype)


def test_a_transposed_tensor_is_narrowed_in_its_own_order() -> None:
    values = np.random.default_rng(5).standard_normal((7, 5)).astype(np.float32)
    np.testing.assert_array_equal(narrow(values.T, "BF16"), narrow(values, "BF16").T)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_finite_tells_every_16_bit_pattern_as_torch_does(dtype: str) -> None:
    stored = ALL_16.view(STORED_AS[dtype])
    expected = to_torch(stored, dtype).isfinite().numpy()
    assert [finite(stored[i : i + 1], dtype) for i in range(0, 2**16, 7)] == expected[::7].tolist()
    assert finite(stored[expected], dtype)
    for pattern in stored[~expected][::31]:
        assert not finite(np.append(stored[expected], pattern), dtype)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_finite_finds_nan_and_infinity_of_either_sign(dtype: str) -> None:
    numbers = np.array([0, -0.0, 5e-324, -5e-324, 1, 0, 0], STORED_AS[dtype])
    numbers[-2:] = np.finfo(numbers.dtype).max, np.finfo(numbers.dtype).min
    assert finite(numbers, dtype)
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not finite(np.append(numbers, np.array(bad, numbers.dtype)), dtype)
