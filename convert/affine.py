"""MLX's affine quantisation in NumPy, bit for bit what `mx.quantize` and `mx.dequantize` give on MLX's CPU.

Notable:
- A group of 32, 64 or 128 neighbours in a row shares a scale and a bias: value = code * scale + bias.
- The extreme of larger magnitude is the bias, so that it is met exactly; the scale is stretched until zero is a whole
  number of steps away.
- Codes are a stream of bits from the lowest on; a packed row is uint32 words of a little-endian machine.
- Everything runs over blocks that stay in a core's cache, in NumPy calls that let go of the interpreter's lock, so
  that several threads can work on blocks of rows at once.

Source of the method: MLX, mlx/backend/cpu/quantized.cpp (`quantize`); `dequantize` there is two operations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ivcore.floats import BLOCK, narrow, widen
from ivcore.shards import STORED_AS

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# The smallest scale: what a group of equal values gets.
_EPSILON = np.float32(1e-7)
# Eight codes of any width fill whole bytes.
_CODES = 8


class Packed(NamedTuple):
    """weight: uint32 (rows, columns * bits / 32); scales, biases: (rows, columns / group_size), in a stored form."""

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


def quantize(values: np.ndarray, bits: int, group_size: int, dtype: str = "F32") -> Packed:
    """A matrix (rows, columns) in the stored form of F32, F16 or BF16, packed; scales and biases are of its dtype.

    The numbers must be finite: NaN and infinity give codes that mean nothing. A group whose range is beyond float32
    gets an infinite scale, as in MLX. Raises ValueError for columns that are not whole groups, and for bits or groups
    that MLX has not.
    """
    rows, columns = values.shape
    _check(columns, bits, group_size)
    groups = np.ascontiguousarray(values).reshape(-1, group_size)
    scales, biases = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    packed = np.empty((len(groups), group_size // _CODES, bits), np.uint8)
    step = max(1, min(BLOCK // group_size, len(groups)))
    wide, scratch = np.empty((step, group_size), np.float32), np.empty(step * group_size, np.float32)
    codes = np.empty(step * group_size, np.uint8)
    for start in range(0, len(groups), step):
        span = slice(start, start + step)
        block = groups[span]
        x = widen(block, dtype, wide[: len(block)])
        # Reducing over the first axis is several times faster than over a last one as short as a group.
        columnwise = scratch[: x.size].reshape(x.T.shape)
        np.copyto(columnwise, x.T)
        scales[span], biases[span] = _scale_and_bias(columnwise.min(axis=0), columnwise.max(axis=0), bits)
        quotient = columnwise.reshape(x.shape)
        with np.errstate(all="ignore"):
            np.subtract(x, biases[span, None], out=quotient)
            np.divide(quotient, scales[span, None], out=quotient)
            np.rint(quotient, out=quotient)
            np.clip(quotient, 0, 2**bits - 1, out=quotient)
            np.copyto(codes[: x.size].reshape(x.shape), quotient, casting="unsafe")
        _pack(codes[: x.size], packed[span].reshape(-1, bits))
    weight = packed.reshape(-1).view(np.uint32).reshape(rows, columns * bits // 32)
    shape = (rows, columns // group_size)
    return Packed(weight, narrow(scales, dtype).reshape(shape), narrow(biases, dtype).reshape(shape))


def dequantize(packed: Packed, bits: int, group_size: int, dtype: str) -> np.ndarray:
    """The matrix (rows, columns) in the stored form of `dtype`, which is that of the scales and biases.

    It rounds as MLX's CPU does: the product code * scale to `dtype`, then its sum with the bias once more. In F16 the
    product may so become infinite where the sum would not. Raises ValueError as `quantize` does.
    """
    rows, columns = packed.weight.shape[0], packed.weight.shape[1] * 32 // bits
    _check(columns, bits, group_size)
    scales, biases = (widen(part.reshape(-1, 1), dtype) for part in (packed.scales, packed.biases))
    stream = np.ascontiguousarray(packed.weight).view(np.uint8).reshape(-1, group_size // _CODES, bits)
    stored = np.empty((len(scales), group_size), STORED_AS[dtype])
    step = BLOCK // group_size
    for start in range(0, len(scales), step):
        span = slice(start, start + step)
        codes = _unpack(stream[span].reshape(-1, bits))
        with np.errstate(all="ignore"):
            product = codes.reshape(-1, group_size) * scales[span]
            total = widen(narrow(product, dtype), dtype) + biases[span]
        stored[span] = narrow(total, dtype)
    return stored.reshape(rows, columns)


def _check(columns: int, bits: int, group_size: int) -> None:
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"there is no affine form of {bits} bits in groups of {group_size}")
    if columns % group_size:
        raise ValueError(f"{columns} columns are not whole groups of {group_size}")


def _scale_and_bias(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of groups from their extremes, float32 each."""
    with np.errstate(all="ignore"):
        from_low = np.abs(low) > np.abs(high)
        edge = np.where(from_low, low, high)
        scale = np.maximum((high - low) / np.float32(2**bits - 1), _EPSILON)
        scale = np.where(from_low, scale, -scale)
        steps = np.rint(edge / scale)
        stretched = steps != 0
        return np.where(stretched, edge / steps, scale), np.where(stretched, edge, np.float32(0))


def _pack(codes: np.ndarray, packed: np.ndarray) -> None:
    """Write uint8 codes (n,) as a stream of bits, packed: uint8 (n / 8, bits). The codes are overwritten.

    Neighbours are joined, by twos, fours and eights, in integers of twice the width: low + high * 2^width becomes
    low + high * 2^used.
    """
    used = packed.shape[1]
    if used == 8:
        np.copyto(packed.reshape(-1), codes)
        return
    for nbytes in (2, 4, 8):
        joined, width = codes.view(f"u{nbytes}"), 4 * nbytes
        excess = np.right_shift(joined, width)
        np.multiply(excess, 2**width - 2**used, out=excess)
        np.subtract(joined, excess, out=joined)
        used *= 2
    bits = packed.shape[1]
    if bits in (2, 4):
        np.copyto(packed.view(f"u{bits}").reshape(-1), joined, casting="unsafe")
    else:
        np.copyto(packed, joined.view(np.uint8).reshape(-1, _CODES)[:, :bits])


def _unpack(packed: np.ndarray) -> np.ndarray:
    """The uint8 codes (n,) of a stream of bits, uint8 (n / 8, bits): what `_pack` does, backwards."""
    codes = np.zeros((len(packed), _CODES), np.uint8)
    codes[:, : packed.shape[1]] = packed
    if packed.shape[1] < 8:
        used = 4 * packed.shape[1]
        for nbytes in (8, 4, 2):
            joined, width = codes.view(f"u{nbytes}"), 4 * nbytes
            excess = np.right_shift(joined, used)
            np.multiply(excess, 2**width - 2**used, out=excess)
            np.add(joined, excess, out=joined)
            used //= 2
    return codes.reshape(-1)
