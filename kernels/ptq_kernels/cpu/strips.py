"""The layout that the C++ libraries read, and the product by one of them.

qweight of layout "strips": uint8, one dimension. First the codes, in strips of 16 rows of the weight, as codes.h places
them; then, for each strip and group, the 16 scales in their own dtype; then, unless the weight is symmetric, the 16
zeros. Rows are padded to a multiple of 32 and every group to a multiple of 32 columns, where the caller's x counts as
zero. The bytes mean the same for every instruction set, but are only meant for the memory of one process.
"""

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels import bitstream, layouts
from ptq_kernels.cpu import library
from ptq_kernels.layouts import Layout, PackedWeight

_STRIP, _UNIT = 16, 32
_HUGE_PAGE = 2**21  # bytes, of x86 and of Arm with pages of 4 KiB
_MOST_PADDING = 1.5  # padded columns over columns
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAST, _EXACT, _BYTES, _PAIRS = 0, 1, 2, 3  # the modes of qmm_matmul
_FLOAT32_MODES = {"highest": _EXACT, "high": _PAIRS, "medium": _FAST}
_MOST_BYTES = 2**24  # codes of 2**bits times bytes of 2**7 must add up to less than 2**31


def _padded_group(weight: PackedWeight) -> int:
    return -(-weight.group_size // _UNIT) * _UNIT


def _padded_rows(weight: PackedWeight) -> int:
    return -(-weight.out_features // (2 * _STRIP)) * 2 * _STRIP


def _groups(weight: PackedWeight) -> int:
    return weight.in_features // weight.group_size


def _code_bytes(weight: PackedWeight) -> int:
    return _padded_rows(weight) * _groups(weight) * _padded_group(weight) * weight.bits // 8


def _refuse(weight: PackedWeight) -> str | None:
    if weight.qweight.device.type != "cpu":
        return f"it is for the CPU, this weight is on {weight.qweight.device}"
    if _padded_group(weight) > _MOST_PADDING * weight.group_size:
        return f"groups are padded to a multiple of {_UNIT}, too much for this group_size of {weight.group_size}"
    if library.best() is None:
        return "no C++ library can be used here"
    return None


def _storage(weight: PackedWeight) -> tuple[torch.dtype, tuple[int, ...]]:
    per_group = weight.scales.element_size() + (weight.zeros is not None)
    return torch.uint8, (_code_bytes(weight) + _padded_rows(weight) * _groups(weight) * per_group,)


def any_library() -> library.Library:
    """The fastest library; RuntimeError where there is none. Packing is the same in all of them."""
    if (found := library.best()) is None:
        raise RuntimeError(
            f"a weight in layout 'strips' needs a C++ library; {library.refuse(library.preferred()[-1])}; or bring the "
            "weight here as a state dict, which is canonical, instead of a pickled module"
        )
    return found


def _memory(size: int) -> Tensor:
    """uint8 [size], in huge pages where Linux grants them on request.

    A product of one row reads a weight once from end to end, and waits for the entries of thousands of small pages.
    """
    if size < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=private)  # what is not touched takes no memory
    except OSError:  # torch says what is missing
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    start = -torch.frombuffer(pages, dtype=torch.uint8, count=1).data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE_PAGE * _HUGE_PAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start)


def _pack(weight: PackedWeight) -> Tensor:
    qweight = _memory(_storage(weight)[1][0])
    padded, groups = _padded_group(weight), _groups(weight)
    stream = weight.qweight
    if padded != weight.group_size:
        codes = bitstream.unpack(stream, weight.bits, weight.in_features).view(-1, groups, weight.group_size)
        codes = functional.pad(codes, (0, padded - weight.group_size))
        stream = bitstream.pack(codes.view(weight.out_features, -1), weight.bits)
    stream = stream.contiguous()
    any_library().pack(stream.data_ptr(), qweight.data_ptr(), weight.out_features, groups * padded, weight.bits)
    start = _code_bytes(weight)
    for tensor in (weight.scales, weight.zeros):
        if tensor is not None:
            part = _by_strip(tensor, _padded_rows(weight))
            qweight[start : start + part.numel()] = part
            start += part.numel()
    return qweight


def _by_strip(tensor: Tensor, rows: int) -> Tensor:
    """``[N, groups]`` as bytes in the order ``[strip, group, row of the strip]``; rows beyond N are 0."""
    padded = functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
    return padded.view(-1, _STRIP, tensor.shape[1]).transpose(1, 2).contiguous().view(-1).view(torch.uint8)


def _unpack(weight: PackedWeight) -> Tensor:
    padded, groups = _padded_group(weight), _groups(weight)
    words = bitstream.words(groups * padded, weight.bits)
    stream = torch.empty(weight.out_features, words, dtype=torch.int32, device="cpu")
    packed = weight.qweight.contiguous()
    any_library().unpack(packed.data_ptr(), stream.data_ptr(), weight.out_features, groups * padded, weight.bits)
    if padded == weight.group_size:
        return stream
    codes = bitstream.unpack(stream, weight.bits, groups * padded).view(-1, groups, padded)[..., : weight.group_size]
    return bitstream.pack(codes.reshape(weight.out_features, -1), weight.bits)


def mode(dtype: torch.dtype, activation: str | None) -> int:
    """The mode of qmm_matmul for rows of `dtype`."""
    if activation is not None:
        return _BYTES
    return _FLOAT32_MODES[torch.get_float32_matmul_precision()] if dtype is torch.float32 else _FAST


def arguments(weight: PackedWeight) -> tuple[int, int, int, int, bool]:
    """What `ptq_kernels::strips` has to know of a weight besides its bytes."""
    kind = TYPES[weight.scales.dtype]
    return weight.out_features, weight.group_size, weight.bits, kind, weight.zeros is not None


def matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, by: library.Library, activation: str | None = None
) -> Tensor:
    """``x [..., K] @ weight.T + bias`` for a contiguous x with rows; ``[..., N]`` in ``x.dtype``.

    Sums are float32 and rounded once. float32 rows are multiplied as exactly as float32 allows, unless
    ``torch.set_float32_matmul_precision`` permits less than "highest". Where bfloat16 alone has a fast product (AMX,
    AVX512-BF16), other rows are rounded to bfloat16 when there are more than two or four, and dequantized weights are
    when there are many; with "high" AMX multiplies float32 rows as sums of two bfloat16 values instead. With activation
    "int8" the rows are as `reference.quantize_rows` rounds them, and sums over a group are integers.

    Raises RuntimeError for a width that the library does not know.
    """
    packed, offset = weight.qweight.contiguous(), None if bias is None else bias.contiguous()
    out_features, group_size, bits, scale_type, has_zeros = arguments(weight)
    described = library.Linear(
        packed=packed.data_ptr(),
        bias=None if offset is None else offset.data_ptr(),
        n=out_features,
        k=weight.in_features,
        group=group_size,
        scale_type=scale_type,
        bias_type=0 if offset is None else TYPES[offset.dtype],
        has_zeros=has_zeros,
        bits=bits,
    )
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device="cpu")
    rows, kind = x.numel() // weight.in_features, TYPES[x.dtype]
    chosen = mode(x.dtype, activation)
    if by.matmul(ctypes.addressof(described), x.data_ptr(), kind, y.data_ptr(), rows, chosen):
        raise RuntimeError(f"bits must be one of {bitstream.BITS}, the library got {bits}; pack the weight anew")
    return y


def refuse_int8(weight: PackedWeight, by: library.Library | None) -> str | None:
    """Why `by` cannot multiply rows in 8 bits with a weight; None: it can."""
    if weight.layout == "canonical" and (reason := _refuse(weight)):
        return f"it needs the weight in layout 'strips', which cannot hold this one: {reason}"
    if weight.layout != "strips":
        return f"it needs the weight in layout 'strips', this one is {weight.layout!r}; convert it with prepare"
    if by is None or by.name not in library.WITH_INT8:
        found = "there is none" if by is None else f"the one for {by.name} has no such instructions"
        return f"it needs a processor with AVX512-VNNI and a C++ library of {library.WITH_INT8}, {found}"
    if weight.group_size > _MOST_BYTES >> weight.bits:
        return (
            f"its integer sums need group_size <= {_MOST_BYTES >> weight.bits} at {weight.bits} bits, "
            f"this is {weight.group_size}"
        )
    return None


layouts.register(Layout("strips", _storage, _refuse, _pack, _unpack))
