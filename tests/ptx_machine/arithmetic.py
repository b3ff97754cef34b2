"""Instructions that only compute: each name gives a function of arrays and the types of its operands and its result."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import MachineError
from ptx_machine.values import arithmetic16, fused, fused16, narrow, widen

Array = NDArray[Any]
TYPES: dict[str, type[Any]] = {
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "u8": np.uint8, "u16": np.uint16,
    "u32": np.uint32, "u64": np.uint64, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    "bf16": np.uint16, "f16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32,
}  # fmt: skip
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Computation(NamedTuple):
    """A function with the types of its operands and its result."""

    function: Callable[..., Array]
    operands: tuple[str, ...]
    result: str


def _clamped(b: Array, width: int) -> tuple[Array, Array]:
    return np.minimum(b, np.uint32(width - 1)), b >= width


def _shl(kind: str) -> Callable[..., Array]:
    dtype, width = TYPES[kind], 8 * np.dtype(TYPES[kind]).itemsize

    def function(a: Array, b: Array) -> Array:
        amount, beyond = _clamped(b, width)
        shifted: Array = np.where(beyond, dtype(0), a << amount.astype(dtype))
        return shifted

    return function


def _shr(kind: str) -> Callable[..., Array]:
    dtype, width = TYPES[kind], 8 * np.dtype(TYPES[kind]).itemsize
    signed = kind[0] == "s"

    def function(a: Array, b: Array) -> Array:
        amount, beyond = _clamped(b, width)
        shifted: Array = a >> amount.astype(dtype)  # of a signed value: its sign again and again
        return shifted if signed else np.where(beyond, dtype(0), shifted)

    return function


def _bfe(kind: str) -> Callable[..., Array]:
    dtype, width = TYPES[kind], 8 * np.dtype(TYPES[kind]).itemsize

    def one(value: int, start: int, length: int) -> int:
        start, length = start & 0xFF, length & 0xFF
        field = (value >> start) & ((1 << length) - 1)  # of a signed value with its sign beyond the end, as PTX says
        if kind[0] == "s" and length:
            return field - (1 << length) if field >> (length - 1) & 1 else field
        return field

    def function(a: Array, b: Array, c: Array) -> Array:
        start, length = int(b[0]) & 0xFF, int(c[0]) & 0xFF
        if kind[0] == "u" and (b == b[0]).all() and (c == c[0]).all() and start + length <= width and length:
            cut: Array = (a >> dtype(start)) & dtype((1 << length) - 1)
            return cut
        mask = (1 << width) - 1
        fields = [one(*field) & mask for field in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
        return np.array(fields, np.uint64).astype(dtype)

    return function


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros_like(a)
    code = int(table[0])
    for i in range(8):
        if code >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    pool = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
    digits = (selector[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & np.uint32(15)
    picked = np.take_along_axis(pool, (digits & 7).astype(np.int64), axis=1)
    signs = np.where(picked >> 7, np.uint8(0xFF), np.uint8(0))
    return np.where(digits & 8, signs, picked).view(np.uint32).reshape(-1)


def _quotient(a: Array, b: Array) -> Array:
    if (b == 0).any():
        raise MachineError("division by zero")
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(wide_a) // np.abs(wide_b)
    result: Array = np.where((wide_a < 0) ^ (wide_b < 0), -quotient, quotient).astype(a.dtype)
    return result


def _remainder(a: Array, b: Array) -> Array:
    rest: Array = a - _quotient(a, b) * b
    return rest


def _high(kind: str) -> Callable[..., Array]:
    wide = TYPES[_WIDER[kind]]
    shift = wide(8 * np.dtype(TYPES[kind]).itemsize)

    def function(a: Array, b: Array) -> Array:
        product: Array = a.astype(wide) * b.astype(wide) >> shift
        high: Array = product.astype(TYPES[kind])
        return high

    return function


def _minmax(name: str, kind: str) -> Callable[..., Array]:
    if kind[0] == "f":  # a NaN loses against a number
        return np.fmin if name == "min" else np.fmax
    return np.minimum if name == "min" else np.maximum


def _funnel(name: str) -> Callable[..., Array]:
    """shf.l or shf.r: a is the lower half of what is shifted; of a left shift the upper half is the result."""

    def function(a: Array, b: Array, c: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a
        amount = (c & np.uint32(31)).astype(np.uint64)
        shifted: Array = both << amount >> np.uint64(32) if name == "l" else both >> amount
        return shifted.astype(np.uint32)

    return function


_SAME: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "div": _quotient, "rem": _remainder, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
_UNARY = ("neg", "abs", "not")
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _differ(a: Array, b: Array) -> Array:
    """Compare as setp.ne does: a NaN does not differ from anything."""
    return (a < b) | (a > b)


def _chosen(a: Array, b: Array, predicate: Array) -> Array:
    chosen: Array = np.where(predicate, a, b)
    return chosen


def _packed(name: str, kind: str) -> Computation | None:
    """Two values, or one, of 16 bits."""
    base = kind.removesuffix("x2")
    bits = TYPES[kind]

    def binary(a: Array, b: Array) -> Array:
        return arithmetic16(name, a.view(np.uint16), b.view(np.uint16), base).view(bits)

    def ternary(a: Array, b: Array, c: Array) -> Array:
        return fused16(a.view(np.uint16), b.view(np.uint16), c.view(np.uint16), base).view(bits)

    if name == "fma":
        return Computation(ternary, (kind,) * 3, kind)
    return Computation(binary, (kind,) * 2, kind) if name in ("add", "sub", "mul") else None


def _multiplied(name: str, how: str, kind: str) -> Computation | None:
    """mul and mad of integers."""
    wide = _WIDER.get(kind, "")
    more = name == "mad"
    if how == "lo":
        return Computation((lambda a, b, c: a * b + c) if more else np.multiply, (kind,) * (3 if more else 2), kind)
    if how == "hi" and not more and wide:
        return Computation(_high(kind), (kind,) * 2, kind)
    if how == "wide" and wide:
        dtype = TYPES[wide]
        if more:
            return Computation(lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, (kind, kind, wide), wide)
        return Computation(lambda a, b: a.astype(dtype) * b.astype(dtype), (kind,) * 2, wide)
    return None


def _converted(words: list[str]) -> Computation | None:
    """cvt."""
    to, source = words[-2], words[-1]
    rounding = words[1:-2]
    if rounding == ["rn"] and source == "f32" and to in ("bf16", "f16"):
        return Computation(lambda a: narrow(a, to), ("f32",), to)
    if rounding == ["rn"] and source == "f32" and to in ("bf16x2", "f16x2"):  # the first one is the upper half
        half = to.removesuffix("x2")
        return Computation(
            lambda a, b: narrow(np.stack([b, a], axis=1).reshape(-1), half).view(np.uint32), ("f32", "f32"), to
        )
    if not rounding and to == "f32" and source in ("bf16", "f16"):
        return Computation(lambda a: widen(a, source), (source,), "f32")
    integers = to[0] in "su" and source[0] in "su"
    if (not rounding and integers) or (rounding == ["rn"] and to == "f32" and source[0] in "su"):
        return Computation(lambda a: a.astype(TYPES[to]), (source,), to)
    return None


def computation(opcode: str) -> Computation | None:
    """Return what an opcode computes, or None if this module does not know it."""
    words = opcode.split(".")
    name, kind = words[0], words[-1]
    if kind not in TYPES:
        return None
    if name == "cvt":
        return _converted(words)
    if kind.startswith(("bf16", "f16")):
        return _packed(name, kind) if words[1:-1] in ([], ["rn"]) else None
    if name == "setp" and len(words) == 3 and words[1] in _COMPARISONS:
        compare = _differ if (words[1], kind) == ("ne", "f32") else _COMPARISONS[words[1]]
        return Computation(compare, (kind, kind), "pred")
    if name == "selp":
        return Computation(_chosen, (kind, kind, "pred"), kind)
    if kind == "f32" and words[1:-1] in ([], ["rn"]):
        floats: dict[str, Callable[..., Array]] = {
            "mul": np.multiply,
            "fma": fused,
            **{key: _SAME[key] for key in ("add", "sub", "neg", "abs")},
        }
        if name in floats:
            return Computation(floats[name], ("f32",) * (3 if name == "fma" else 1 if name in _UNARY else 2), "f32")
    if name in ("mul", "mad") and len(words) == 3:
        return _multiplied(name, words[1], kind)
    if name in ("min", "max") and len(words) == 2:
        return Computation(_minmax(name, kind), (kind, kind), kind)
    special = {"shl": _shl, "shr": _shr, "bfe": _bfe}
    if name in special:
        return Computation(special[name](kind), (kind, "u32", "u32") if name == "bfe" else (kind, "u32"), kind)
    if opcode in ("shf.l.wrap.b32", "shf.r.wrap.b32"):
        return Computation(_funnel(words[1]), ("b32", "b32", "u32"), "b32")
    if opcode in ("lop3.b32", "prmt.b32"):
        return Computation(_lop3 if name == "lop3" else _prmt, ("b32",) * (4 if name == "lop3" else 3), "b32")
    if name in _SAME and len(words) == 2 and kind[0] != "f":
        return Computation(_SAME[name], (kind,) * (1 if name in _UNARY else 2), kind)
    return None
