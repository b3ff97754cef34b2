"""The canonical weight layout: codes as one dense little-endian bit stream a row, stored in int32 words.

Value ``i`` of a row occupies stream bits ``bits * i`` to ``bits * i + bits - 1``; a 3-bit value may straddle two words
and the last word is padded with zeros. This is ``weight_packed`` of the compressed-tensors "pack-quantized" format.

Packing and unpacking work on whole tensors: a little lane (one byte, or three for 3 bits) is spread over the bytes of a
wider integer by shift-or-mask steps, each of which splits every field in two.
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)

# bits -> (stream bytes of a lane, the integer with one byte for each of its codes, the spreading steps)
_SPREAD: dict[int, tuple[int, torch.dtype, tuple[tuple[int, int], ...]]] = {
    2: (1, torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (3, torch.int64, ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: (1, torch.int16, ((4, 0x0F0F),)),
    8: (1, torch.uint8, ()),
}


def words(in_features: int, bits: int) -> int:
    """int32 words of one packed row."""
    return -(-in_features * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` uint8 ``[N, K]`` into int32 ``[N, ceil(K * bits / 32)]``.

    Raises ValueError for a width outside 2, 3, 4, 8, no codes or a code that needs more bits, TypeError for another
    dtype.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(
            f"pack needs uint8 codes of shape [N, K], got {codes.dtype} {list(codes.shape)}; pass codes.to(torch.uint8)"
        )
    if not codes.numel():
        raise ValueError(f"pack needs at least one row and one column of codes, got {list(codes.shape)}; leave it out")
    if not codes.is_meta and (top := int(codes.max())) >= 2**bits:
        raise ValueError(f"a {bits}-bit code must be below {2**bits}, found {top}; clamp the codes or use more bits")
    rows, columns = codes.shape
    lane_bytes, wide, steps = _SPREAD[bits]
    padded = -(-columns // 32) * 32  # whole lanes and whole words for every width
    lanes = torch.nn.functional.pad(codes, (0, padded - columns)).contiguous().view(wide)
    masks = [2 ** (8 * lane_bytes) - 1, *(mask for _, mask in steps)]
    for (shift, _), mask in zip(reversed(steps), reversed(masks[:-1]), strict=True):
        lanes = (lanes | (lanes >> shift)) & mask
    stream = torch.stack([(lanes >> 8 * i) & 255 for i in range(lane_bytes)], dim=-1).to(torch.uint8)
    return stream.view(rows, -1).view(torch.int32)[:, : words(columns, bits)].contiguous()


class Unpacker:
    """Unpacks up to ``rows`` rows at a time into memory it keeps; what a call returns is valid until the next call."""

    def __init__(self, bits: int, in_features: int, rows: int, device: torch.device) -> None:
        """Allocate for `rows` rows of `in_features` codes: 2 bytes a code (1 for 8 bits)."""
        self.in_features = in_features
        self._lane_bytes, wide, self._steps = _SPREAD[bits]
        lanes = -(-4 * words(in_features, bits) // self._lane_bytes)
        self._lanes = torch.empty(rows, lanes, dtype=wide, device=device)
        self._other = torch.empty(rows if self._steps else 0, lanes, dtype=wide, device=device)
        padded = torch.Size((rows if self._lane_bytes > 1 else 0, lanes * self._lane_bytes))
        self._padded = torch.zeros(padded, dtype=torch.uint8, device=device)

    def __call__(self, qweight: Tensor) -> Tensor:
        """int32 ``[R, words]`` to codes uint8 ``[R, in_features]``, not necessarily contiguous between rows."""
        rows = qweight.shape[0]
        stream, lanes, other = qweight.contiguous().view(torch.uint8), self._lanes[:rows], self._other[:rows]
        if self._lane_bytes == 1:
            lanes.copy_(stream)
        else:
            padded = self._padded[:rows]
            padded[:, : stream.shape[1]] = stream
            lanes.copy_(padded[:, :: self._lane_bytes])
            for i in range(1, self._lane_bytes):
                other.copy_(padded[:, i :: self._lane_bytes])
                lanes.bitwise_or_(other.bitwise_left_shift_(8 * i))
        for shift, mask in self._steps:
            torch.bitwise_left_shift(lanes, shift, out=other)
            lanes.bitwise_or_(other).bitwise_and_(mask)
        return lanes.view(torch.uint8)[:, : self.in_features]


def unpack(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """The codes, uint8 ``[N, in_features]``, of ``qweight`` int32 ``[N, ceil(in_features * bits / 32)]``.

    Raises ValueError for a width outside 2, 3, 4, 8 or a packed width that does not fit, TypeError for another dtype.
    """
    check_bits(bits)
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise TypeError(
            f"unpack needs int32 words of shape [N, words], got {qweight.dtype} {list(qweight.shape)}; "
            "pass what pack() returned"
        )
    if qweight.shape[1] != words(in_features, bits):
        raise ValueError(
            f"{in_features} values of {bits} bits need {words(in_features, bits)} words a row, "
            f"got {qweight.shape[1]}; pass the in_features and bits that the weight was packed with"
        )
    return Unpacker(bits, in_features, qweight.shape[0], qweight.device)(qweight).contiguous()


def check_bits(bits: int) -> None:
    """Raise ValueError for a width outside 2, 3, 4, 8."""
    if isinstance(bits, float) or bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}; requantize with a supported width")
