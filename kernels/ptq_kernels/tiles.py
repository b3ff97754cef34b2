"""Fragment-order layouts "tile_sm90" and "tile_sm80": codes lie as the tensor core's operand registers want them.

The weight is cut into 64 x 64 tiles; what one of 128 threads needs of a tile lies together, so a kernel loads 16 bytes
a thread and unpacks them in place, with no exchange between threads. "tile_sm90" follows the register operand of
Hopper's wgmma, "tile_sm80" mma.sync of every other GPU from Ampere on. Both are right everywhere, one is faster.

Of a code's row n in its tile, ``w = n / 16`` is a warp, of its column k the letters below are digits, most significant
first; thread ``t = 32 w + 4 lh + ll``:

    ========= ==== ================================ =============================================================
    layout    bits n, k                             place: byte of the tile; bit of a 32-bit word
    ========= ==== ================================ =============================================================
    tile_sm90 4    w rh lh; j(4) r ll(4) kk         ``16 t + 4 j``; ``16 kk + 8 r + 4 rh``
    tile_sm90 8    w rh lh; h j r ll(4) kk          ``2048 h + 16 t + 8 j + 4 r``; ``16 rh + 8 kk``
    tile_sm80 4    w jr lh; jt ll(4) r eh kk        ``16 t + 8 jt + 4 jr``; ``16 kk + 8 r + 4 eh``
    tile_sm80 8    w jr lh; jt ll(4) r eh kk        ``2048 jt + 16 t + 8 jr + 4 r``; ``16 eh + 8 kk``
    ========= ==== ================================ =============================================================

qweight is uint8 ``[bytes]``: the tiles ``[N' / 64, K' / 64, 512 * bits]``, then the scales ``[G', N']`` in their own
dtype, then the zeros uint8 ``[G', N']`` where there are any. N' and K' are N and K rounded up to 128; G' is the groups
of K' and two more, which a kernel may fetch ahead, or 1 where a group is the whole row. What is added has scale 0. The
canonical scales and zeros stay beside it, so the conversion back is exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels import bitstream, layouts
from ptq_kernels.layouts import Layout, PackedWeight

TILE = 64
ALIGNMENT = 128  # of N' and K'
SPANS = (128, 64, 32)  # columns that share a scale in one step of a kernel
BITS = (4, 8)
_CONVERTED_ROWS = 1024  # converted at a time, so that a large weight is never held with a byte for each code


class _Order(NamedTuple):
    """How ``[N / 64, 64, K / 64, 64]`` codes become ``[N / 64, K / 64, words, fields]``."""

    split: tuple[int, ...]  # the two 64s, cut into digits
    rows: int  # digits of the row among them
    axes: tuple[int, ...]  # digits in the order of the storage; the last three select a field of a word
    shifts: tuple[int, ...]  # of the field, in bits


_ORDERS = {
    # digits: w rh lh | j r ll kk
    ("tile_sm90", 4): _Order((4, 2, 8, 4, 2, 4, 2), 3, (0, 2, 5, 3, 6, 4, 1), (0, 4, 8, 12, 16, 20, 24, 28)),
    # digits: w rh lh | h j r ll kk
    ("tile_sm90", 8): _Order((4, 2, 8, 2, 2, 2, 4, 2), 3, (3, 0, 2, 6, 4, 5, 1, 7), (0, 8, 16, 24)),
    # digits: w jr lh | jt ll r eh kk
    ("tile_sm80", 4): _Order((4, 2, 8, 2, 4, 2, 2, 2), 3, (0, 2, 4, 3, 1, 7, 5, 6), (0, 4, 8, 12, 16, 20, 24, 28)),
    ("tile_sm80", 8): _Order((4, 2, 8, 2, 4, 2, 2, 2), 3, (3, 0, 2, 4, 1, 5, 6, 7), (0, 8, 16, 24)),
}


def padded(size: int) -> int:
    """`size` rounded up to what a kernel may read without a mask."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def span(weight: PackedWeight) -> int | None:
    """Columns that share a scale in one step of a kernel: 128, 64 or 32; None where the groups are cut otherwise."""
    if weight.group_size == weight.in_features:  # one group: the columns beyond it are masked
        return SPANS[0]
    return next((size for size in SPANS if weight.group_size % size == 0), None)


def groups(weight: PackedWeight) -> int:
    """G', the rows of scales."""
    if weight.group_size == weight.in_features:
        return 1
    return -(-padded(weight.in_features) // weight.group_size) + 2


def tile_bytes(weight: PackedWeight) -> int:
    """Bytes of the tiles, before the scales."""
    return padded(weight.out_features) * padded(weight.in_features) * weight.bits // 8


def _storage(weight: PackedWeight) -> tuple[torch.dtype, tuple[int, ...]]:
    each = weight.scales.element_size() + (weight.zeros is not None)
    return torch.uint8, (tile_bytes(weight) + each * groups(weight) * padded(weight.out_features),)


def _refuse(name: str, weight: PackedWeight) -> str | None:
    if weight.bits not in BITS:
        return f"it is for {BITS[0]} and {BITS[1]} bits, this weight has {weight.bits}"
    if span(weight) is None:
        return f"the group size must be in_features or a multiple of {SPANS[-1]}, found {weight.group_size}"
    device = weight.qweight.device
    if name == "tile_sm90" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return "it is the operand order of compute capability 9; tile_sm80 is the one of this GPU"
    return None


def _encode(codes: Tensor, name: str, bits: int) -> Tensor:
    """The tiles ``[N / 64, K / 64, 512 * bits]`` of codes ``[N, K]``, both multiples of 64."""
    order = _ORDERS[name, bits]
    down, across = codes.shape[0] // TILE, codes.shape[1] // TILE
    digits = codes.view(down, *order.split[: order.rows], across, *order.split[order.rows :])
    fields = digits.permute(_storage_axes(order)).reshape(-1, len(order.shifts)).int()
    words = fields[:, 0].clone()
    for i, shift in enumerate(order.shifts[1:], start=1):
        words |= fields[:, i] << shift
    return words.view(torch.uint8).view(down, across, TILE * TILE * bits // 8)


def _decode(tiles: Tensor, name: str, bits: int) -> Tensor:
    """The inverse of `_encode`."""
    order = _ORDERS[name, bits]
    down, across, _ = tiles.shape
    shifts = torch.tensor(order.shifts, dtype=torch.int32, device=tiles.device)
    words = tiles.reshape(-1).view(torch.int32).unsqueeze(-1)
    fields = ((words >> shifts) & (2**bits - 1)).to(torch.uint8)
    axes = _storage_axes(order)
    split = (down, *order.split[: order.rows], across, *order.split[order.rows :])
    digits = fields.view([split[axis] for axis in axes])
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    codes: Tensor = digits.permute(inverse).reshape(down * TILE, across * TILE)
    return codes


def _storage_axes(order: _Order) -> list[int]:
    """`order.axes` as axes of the codes cut as ``[N / 64, row digits, K / 64, column digits]``."""
    place = [1 + digit + (digit >= order.rows) for digit in order.axes]
    return [0, 1 + order.rows, *place]


def _transposed(values: Tensor, weight: PackedWeight) -> Tensor:
    """``[N, G]`` as contiguous ``[G', N']``, with 0 where something was added."""
    full: Tensor = values.new_zeros(groups(weight), padded(weight.out_features))
    full[: values.shape[1], : values.shape[0]] = values.T
    return full


def _pack(name: str, weight: PackedWeight) -> Tensor:
    bits, rows, columns = weight.bits, padded(weight.out_features), padded(weight.in_features)
    dtype, shape = _storage(weight)
    qweight = torch.empty(shape, dtype=dtype, device=weight.qweight.device)
    row_bytes = columns * bits // 8
    for start in range(0, rows, _CONVERTED_ROWS):
        stop = min(start + _CONVERTED_ROWS, rows)
        codes = torch.zeros(stop - start, columns, dtype=torch.uint8, device=qweight.device)
        part = bitstream.unpack(weight.qweight[start:stop], bits, weight.in_features)
        codes[: part.shape[0], : part.shape[1]] = part
        qweight[start * row_bytes : stop * row_bytes] = _encode(codes, name, bits).view(-1)
    rest = [_transposed(weight.scales, weight).view(-1).view(torch.uint8)]
    if weight.zeros is not None:
        rest.append(_transposed(weight.zeros, weight).view(-1))
    torch.cat(rest, out=qweight[rows * row_bytes :])
    return qweight


def _unpack(name: str, weight: PackedWeight) -> Tensor:
    bits, rows, columns = weight.bits, padded(weight.out_features), padded(weight.in_features)
    row_bytes = columns * bits // 8
    parts = []
    for start in range(0, weight.out_features, _CONVERTED_ROWS):
        stop = min(start + _CONVERTED_ROWS, rows)
        tiles = weight.qweight[start * row_bytes : stop * row_bytes].view((stop - start) // TILE, columns // TILE, -1)
        codes = _decode(tiles, name, bits)[: weight.out_features - start, : weight.in_features]
        parts.append(bitstream.pack(codes, bits))
    return torch.cat(parts)


def _register(name: str) -> None:
    layouts.register(
        Layout(
            name,
            storage=_storage,
            refuse=lambda weight: _refuse(name, weight),
            pack=lambda weight: _pack(name, weight),
            unpack=lambda weight: _unpack(name, weight),
        )
    )


NAMES = ("tile_sm90", "tile_sm80")
for _name in NAMES:
    _register(_name)
