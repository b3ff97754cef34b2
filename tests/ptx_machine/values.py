"""Numbers of 16 bits, rounded to nearest, ties to even, as the hardware does."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]
_NAN = np.uint16(0x7FFF)  # the only NaN that the hardware gives


def widen(bits: U16, kind: str) -> F32:
    """Values of bfloat16 or float16 bits, exactly."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrow(values: F32, kind: str) -> U16:
    """Round float32 to the bits of bfloat16 or float16."""
    if kind == "bf16":
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    else:
        rounded = values.astype(np.float16).view(np.uint16)
    nan = values != values
    return np.where(nan, _NAN, rounded) if nan.any() else rounded


def _odd32(values: F64) -> F32:
    """Round to float32 so that a second rounding sees what the first one lost: an inexact result is an odd one."""
    rounded = values.astype(np.float32)
    change = (
        (rounded.astype(np.float64) != values) & (rounded.view(np.uint32) & np.uint32(1) == 0) & np.isfinite(values)
    )
    toward = np.where(values > rounded, np.float32(np.inf), np.float32(-np.inf))
    return np.where(change, np.nextafter(rounded, toward), rounded)


def _odd_sum(a: F64, b: F64) -> F64:
    """a + b, rounded to odd as in `_odd32`."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    change = (error != 0) & (total.view(np.uint64) & np.uint64(1) == 0) & np.isfinite(total)
    return np.where(change, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def fused(a: F32, b: F32, c: F32) -> F32:
    """a * b + c in float32, rounded once."""
    return _odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def fused16(a: U16, b: U16, c: U16, kind: str) -> U16:
    """a * b + c in 16 bits, rounded once."""
    wide = [widen(x, kind).astype(np.float64) for x in (a, b, c)]
    return narrow(_odd32(_odd_sum(wide[0] * wide[1], wide[2])), kind)


def arithmetic16(name: str, a: U16, b: U16, kind: str) -> U16:
    """Add, subtract or multiply in 16 bits.

    float32 has more than twice their bits, so rounding twice is rounding once, but for products that underflow.
    """
    left, right = widen(a, kind), widen(b, kind)
    if name == "mul":
        exact = left.astype(np.float64) * right
        tiny = kind == "bf16" and bool(((np.abs(exact) < 2.0**-125) & (exact != 0)).any())
        return narrow(_odd32(exact) if tiny else exact.astype(np.float32), kind)
    return narrow(left + right if name == "add" else left - right, kind)
