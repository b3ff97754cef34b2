"""Checks that all codecs make on tensors and configuration blocks. Everything here raises FormatError."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats.capability import problem
from ptq.formats.codec import QuantizedWeight, Scheme

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def require_encodable(codec: str, name: str, quantized: QuantizedWeight) -> None:
    """Raise FormatError unless the parts of ``quantized`` agree with each other and fit the format."""
    rows, columns = quantized.codes.shape
    grid = (rows, columns // quantized.group_size)
    if columns % quantized.group_size or quantized.scales.shape != grid or quantized.zeros.shape != grid:
        raise FormatError(
            f"{name}: codes {[rows, columns]} with group_size {quantized.group_size} need scales and zeros "
            f"[{rows}, {columns}/{quantized.group_size}], found {list(quantized.scales.shape)} and "
            f"{list(quantized.zeros.shape)}"
        )
    reason = problem(codec, Scheme(quantized.bits, quantized.group_size, quantized.symmetric), (rows, columns))
    if reason is not None:
        raise FormatError(f"{name} {[rows, columns]}: {reason}; call the codec's check() before quantizing")
    require_zeros(name, quantized.zeros, quantized.bits, symmetric=quantized.symmetric)


def require_zeros(name: str, zeros: Tensor, bits: int, *, symmetric: bool) -> None:
    """Raise FormatError unless zeros lie in ``0 .. 2**bits - 1``, and equal ``2**(bits-1)`` when symmetric."""
    low, high = (1 << (bits - 1),) * 2 if symmetric else (0, (1 << bits) - 1)
    smallest, largest = (int(zeros.min()), int(zeros.max()))
    if smallest < low or largest > high:
        kind = "symmetric" if symmetric else "asymmetric"
        raise FormatError(
            f"{name}: zeros of a {bits}-bit {kind} weight must be within {low}..{high}, found {smallest}..{largest}"
        )


def export_scales(name: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``scales`` in ``dtype``, value for value. Raises FormatError for NaN, infinity, zero and inexact values."""
    stored = scales.to(dtype)
    bad = ~torch.isfinite(stored) | (scales == 0) | (stored.to(scales.dtype) != scales)
    if bool(bad.any()):
        row, group = (int(index) for index in bad.nonzero()[0])
        raise FormatError(
            f"{name}: scales must be finite, non-zero and exact in {dtype}; {int(bad.sum())} of {bad.numel()} are "
            f"not, the first at row {row}, group {group}: {float(scales[row, group])!r}. "
            "Round scales to the export dtype before quantizing"
        )
    return stored


def take(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], ndim: int) -> Tensor:
    """The tensor ``name``. Raises FormatError when it is missing or has another dtype or rank."""
    if name not in tensors:
        raise FormatError(
            f"tensor {name} is missing; the checkpoint has {sorted(tensors) or 'nothing'} for this module"
        )
    found = tensors[name]
    if found.dtype not in dtypes or found.ndim != ndim:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise FormatError(f"{name}: expected {wanted} with {ndim} axes, found {found.dtype} {list(found.shape)}")
    return found


def require_shape(name: str, found: Tensor, expected: tuple[int, ...]) -> None:
    """Raise FormatError unless the tensor has the expected shape."""
    if tuple(found.shape) != expected:
        raise FormatError(f"{name}: expected shape {list(expected)}, found {list(found.shape)}")


def groups_of(name: str, columns: int, scheme: Scheme) -> tuple[int, int]:
    """Resolved group size and number of groups. Raises FormatError unless groups divide ``columns``."""
    group_size = scheme.columns(columns)
    if columns == 0 or columns % group_size:
        raise FormatError(f"{name}: the config's group_size {group_size} must divide in_features, found {columns}")
    return group_size, columns // group_size


def read_scales(name: str, tensors: Mapping[str, Tensor], expected: tuple[int, int]) -> Tensor:
    """Scales as float32, as they lie in the file. Raises FormatError when missing, misshapen or not finite."""
    stored = take(tensors, name, FLOATS, 2)
    require_shape(name, stored, expected)
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(f"{name}: scales must be finite; the file holds NaN or infinity, so it is damaged")
    return stored.float()


def require_trivial_order(name: str, tensors: Mapping[str, Tensor], columns: int, group_size: int) -> None:
    """Raise FormatError if the optional tensor ``name`` says that column k is not in group ``k // group_size``."""
    if name not in tensors:
        return
    order = take(tensors, name, (torch.int32, torch.int64), 1)
    require_shape(name, order, (columns,))
    trivial = torch.arange(columns, device=order.device) // group_size
    if not torch.equal(order.long(), trivial):
        column = int((order.long() != trivial).nonzero()[0])
        raise FormatError(
            f"{name}: column {column} must belong to group {int(trivial[column])}, found {int(order[column])}. "
            "Act-order checkpoints that permute columns at run time are not read here; ptq.load runs them"
        )


def read_order(name: str, tensors: Mapping[str, Tensor], columns: int, group_size: int) -> Tensor | None:
    """The group of each column, int64 ``[K]``, as the optional tensor ``name`` says; None where they are contiguous.

    Raises FormatError unless every group has ``group_size`` columns.
    """
    if name not in tensors:
        return None
    order = take(tensors, name, (torch.int32, torch.int64), 1)
    require_shape(name, order, (columns,))
    groups = columns // group_size
    order = order.long()
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise FormatError(
            f"{name}: groups must be 0..{groups - 1}, as there are scales; found {int(order.min())}.."
            f"{int(order.max())}: the file is damaged, or group_size in its config is wrong"
        )
    sizes = torch.bincount(order, minlength=groups)
    if bool((sizes != group_size).any()):
        group = int((sizes != group_size).nonzero()[0])
        raise FormatError(
            f"{name}: every group must have {group_size} columns, group {group} has {int(sizes[group])}; groups of "
            "unequal size are not run: quantize the model again with groups of one size"
        )
    contiguous = torch.equal(order, torch.arange(columns, device=order.device) // group_size)
    return None if contiguous else order


def setting(config: Mapping[str, Any], keys: tuple[str, ...], kind: type) -> Any:
    """The value under any of its spellings ``keys``. Raises FormatError if absent, contradictory or not a ``kind``."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if not found:
        raise FormatError(f"the quantization config needs {' or '.join(keys)}, found only {sorted(config)}")
    value = next(iter(found.values()))
    if any(other != value for other in found.values()):
        raise FormatError(f"the quantization config contradicts itself: {found}; make the values equal or remove one")
    if type(value) is not kind:
        raise FormatError(f"{keys[0]} in the quantization config must be {kind.__name__}, found {value!r}")
    return value


def optional(config: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """The value under ``key``, an empty ``kind`` where there is none. Raises FormatError for another kind."""
    value = config.get(key)
    if not value:
        return kind()
    if (kind is bool and value == 1) or (kind is list and isinstance(value, tuple)):
        return kind(value)  # type: ignore[call-arg]  # some write numbers; lists of Python may be tuples
    if not isinstance(value, kind):
        raise FormatError(f"{key} in the quantization config must be {kind.__name__}, found {value!r:.80}")
    return value


def names(config: Mapping[str, Any], key: str) -> list[str]:
    """The list of names or patterns under ``key``, which may be absent. Raises FormatError for anything else."""
    found: list[Any] = optional(config, key, list)
    if wrong := [each for each in found if not isinstance(each, str)]:
        raise FormatError(f"{key} in the quantization config must list names, found {wrong[0]!r:.80} in it")
    return found


def read_scheme(config: Mapping[str, Any], widths: Iterable[int], group_size: int, *, symmetric: bool) -> Scheme:
    """The scheme of a settings block. Raises FormatError for a width outside ``widths`` or a bad group size."""
    bits = setting(config, ("bits", "w_bit", "num_bits"), int)
    if bits not in widths:
        raise FormatError(f"this format holds {', '.join(map(str, sorted(widths)))} bits, the config says {bits}")
    if group_size != -1 and group_size < 1:
        raise FormatError(f"group_size in the quantization config must be -1 or positive, found {group_size}")
    return Scheme(bits, group_size, symmetric)
