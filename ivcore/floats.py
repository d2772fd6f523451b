"""A tensor's float dtypes in NumPy, which has no bfloat16: widened, narrowed, cast, and looked through for NaN.

The stored form of a tensor is what its safetensors file holds: float32, float16 or float64, and for bfloat16 the uint16
bits, the upper half of a float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ivcore.shards import STORED_AS

# The first bits, sign apart, that are infinity; what lies above them is NaN.
_INFINITY = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80, "F64": 0x7FF0_0000_0000_0000}
# Numbers in a block: two or three of them in float32 stay in a cache, and a NumPy call lasts long enough that threads
# seldom wait for each other at the interpreter's lock.
BLOCK = 2**18


def widen(stored: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of a tensor, of the same shape: exact, except that F64 rounds; F32 is returned as it is.

    out: a float32 array of that shape to write to and return.
    """
    if dtype == "BF16":
        values = np.empty(stored.shape, np.float32) if out is None else out
        np.left_shift(stored, np.uint32(16), out=values.view(np.uint32))
        return values
    if out is None:
        with np.errstate(all="ignore"):
            return stored.astype(np.float32, copy=False)
    with np.errstate(all="ignore"):
        np.copyto(out, stored, casting="same_kind")
    return out


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in the stored form of F32, F16 or BF16, rounded to nearest, ties to even, as torch and MLX do.

    What is too large becomes infinity, denormals are kept, and NaN stays NaN (BF16: 0x7FC0). F32 is returned as it is.
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(all="ignore"):
            return values.astype(np.float16)
    if dtype != "BF16":
        raise ValueError(f"nothing is stored as {dtype}")
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    stored = np.empty(bits.size, np.uint16)
    scratch = np.empty(min(bits.size, BLOCK), np.uint32)
    for block in _blocks(bits.size):
        source, rounded = bits[block], scratch[: block.stop - block.start]
        # Half of the last place kept, less one where that place is even; the carry rounds, into infinity as well.
        np.right_shift(source, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += source
        rounded >>= 16
        stored[block] = rounded
        # The carry would make NaN an infinity or zero; torch and MLX do not agree on its bits: these are MLX's.
        stored[block][np.isnan(source.view(np.float32))] = 0x7FC0
    return stored.reshape(values.shape)


def cast(stored: np.ndarray, source: str, target: str) -> np.ndarray:
    """A tensor's stored form in another dtype (F32, F16 or BF16); from F64 it rounds to float32 first, as torch does.

    The same dtype returns the array itself, so that the payload of a NaN passes too.
    """
    if source == target:
        return stored
    if "F32" in (source, target):
        return narrow(widen(stored, source), target)
    flat, result = stored.reshape(-1), np.empty(stored.size, STORED_AS[target])
    for block in _blocks(stored.size):
        result[block] = narrow(widen(flat[block], source), target)
    return result.reshape(stored.shape)


def finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether a tensor has neither NaN nor infinity.

    Their bits lie above every finite number's: read as unsigned integers the negative ones are largest, and read as
    signed integers the positive ones.
    """
    bits, infinity = 8 * stored.itemsize, _INFINITY[dtype]
    return bool(
        stored.view(f"i{stored.itemsize}").max(initial=0) < infinity
        and stored.view(f"u{stored.itemsize}").max(initial=0) < infinity + 2 ** (bits - 1)
    )


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
