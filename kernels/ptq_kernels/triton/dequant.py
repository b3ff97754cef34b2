"""The dense weight from fragment-order tiles: kernels that write some rows of it, for products that cuBLAS does better.

Two of them, that do the same. `words_kernel` is for what nearly all weights are, 4 bits with scales of the dtype asked
for: a word of eight codes becomes four registers of two values without leaving assembly, because the compiler
would pair the values of a word anew, and every value is rounded once, by the multiply-add that applies its scale.
`dequantize_kernel` is for everything else, and for the interpreter, which knows no assembly.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# ruff: noqa: SIM300
# (a dtype of Triton that is a constant is compared from the left)

import triton
import triton.language as tl

from ptq_kernels.triton.fragments import centered, raised_codes
from ptq_kernels.triton.pointers import padded, scales_of, tile_pointers, zeros_of

BLOCK_N = 64
BLOCK_K = 128
WARPS, WARPS_OF_WORDS = 4, 2  # where a thread has 128 values, finding out where they belong counts little


@triton.jit(do_not_specialize=["first_row"])
def dequantize_kernel(
    w_ptr,  # uint8, see tiles.py
    out_ptr,  # [rows, K] bfloat16, float16 or float32, so many rows as programs write
    first_row,  # of the weight, a multiple of 128
    N,
    K,
    BITS: tl.constexpr,
    ORDER: tl.constexpr,
    GROUP: tl.constexpr,  # group size; 0: one group
    SCALES: tl.constexpr,  # dtype of the scales
    ASYM: tl.constexpr,
    SPAN: tl.constexpr,  # columns that share a scale, at most BK
    EVEN_K: tl.constexpr,  # BK divides K
    BN: tl.constexpr,
    BK: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Rows from first_row on, in ``[BN, BK]`` a program: formed in float32, rounded once to the dtype of ``out``."""
    DTYPE: tl.constexpr = tl.bfloat16
    PARTS: tl.constexpr = BK // SPAN
    inner = tl.program_id(0) * BN
    first_k = tl.program_id(1) * BK
    q_ptrs = tile_pointers(w_ptr, (first_row + inner) // 64, first_k // 64, N, K, BITS, BN, BK)
    t = raised_codes(tl.load(q_ptrs), BITS, ORDER, BN, BK, DTYPE, USE_ASM)
    n = first_row + inner + tl.arange(0, BN)
    row = (first_k + tl.arange(0, PARTS) * SPAN).to(tl.int64)
    row = (row // GROUP if GROUP else row * 0) * padded(N)
    scale = tl.load(scales_of(w_ptr, N, K, BITS, SCALES) + row[None, :] + n[:, None]).to(tl.float32)
    zero = row
    if ASYM:
        zero = tl.load(zeros_of(w_ptr, N, K, BITS, SCALES, GROUP) + row[None, :] + n[:, None])
    t = centered(t.reshape(BN, PARTS, SPAN), zero, BITS, ASYM, DTYPE, USE_ASM).to(tl.float32)
    dense = (t * scale[:, :, None]).reshape(BN, BK).to(out_ptr.dtype.element_ty)
    k = first_k + tl.arange(0, BK)
    out_ptrs = out_ptr + (inner + tl.arange(0, BN)).to(tl.int64)[:, None] * K + k[None, :]
    if EVEN_K:
        tl.store(out_ptrs, dense)
    else:
        tl.store(out_ptrs, dense, mask=(k < K)[None, :])


def _unpacking(raised: str, one: str) -> str:
    """Four pairs (code - zero) * scale, $0 to $3, of word $4, of pairs of scales $5, $6 and of raised zeros -$7, -$8.

    `raised` is a pair of the values whose lowest bits a code becomes, `one` a pair of 1. Fields 0 and 2 of a word have
    the first scale and zero, 1 and 3 the second. Every GPU from 8.0 on has multiply-adds of pairs: with 1, and with -0.
    """
    lines = [".reg .b32 a, b, c, one, none;", f"mov.b32 one, {one};", "mov.b32 none, 0x80008000;"]
    lines += [f"shr.u32 {name}, $4, {shift};" for name, shift in (("a", 4), ("b", 8), ("c", 12))]
    lines += [f"lop3.b32 ${i}, {word}, 0x000F000F, {raised}, 0xEA;" for i, word in enumerate(("$4", "a", "b", "c"))]
    kind = "bf16x2" if one == "0x3F803F80" else "f16x2"
    lines += [f"fma.rn.{kind} ${i}, ${i}, one, ${7 + i % 2};" for i in range(4)]
    lines += [f"fma.rn.{kind} ${i}, ${i}, ${5 + i % 2}, none;" for i in range(4)]
    return "{ " + "\n".join(lines) + " }"


_UNPACK_BF16 = tl.constexpr(_unpacking("0x43004300", "0x3F803F80"))
_UNPACK_FP16 = tl.constexpr(_unpacking("0x64006400", "0x3C003C00"))


@triton.jit
def _unpack(q, scale0, scale1, zero0, zero1, ASM: tl.constexpr):
    """int32 words -> pairs of values as int32, for fields 0 to 3 of the half words of each."""
    return tl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r,r,r,r,r", [q, scale0, scale1, zero0, zero1], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )


@triton.jit
def _twice(bits):
    """16 bits, in both halves of an int32."""
    return (bits.to(tl.uint32) * 0x10001).to(tl.int32, bitcast=True)


@triton.jit
def _scale_and_zero(scale_ptr, zero_ptr, at, ASYM: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs of the scale there and of the negative raised zero."""
    scale = _twice(tl.load(scale_ptr + at).to(tl.uint16, bitcast=True))
    RAISED: tl.constexpr = 0xC300 if DTYPE == tl.bfloat16 else 0xE400
    if ASYM:
        zero = _twice(tl.load(zero_ptr + at).to(tl.uint16) | RAISED)
    else:
        zero = tl.full(at.shape, RAISED + 8 - 0x10000, tl.int16).to(tl.uint16, bitcast=True)
        zero = _twice(zero)
    return scale, zero


@triton.jit(do_not_specialize=["first_row"])
def words_kernel(
    w_ptr,  # uint8, see tiles.py
    out_ptr,  # [rows, K] in the dtype of the scales, bfloat16 or float16, so many rows as programs write
    first_row,  # of the weight, a multiple of 128
    N,
    K,  # even
    ORDER: tl.constexpr,
    GROUP: tl.constexpr,  # group size, a multiple of 32; 0: one group
    SCALES: tl.constexpr,  # dtype of the scales
    ASYM: tl.constexpr,
    EVEN_K: tl.constexpr,  # BK divides K
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """As `dequantize_kernel`, for 4 bits."""
    tl.static_assert(SCALES == out_ptr.dtype.element_ty)
    A: tl.constexpr = BN // 64
    B: tl.constexpr = BK // 64
    ASM: tl.constexpr = _UNPACK_BF16 if SCALES == tl.bfloat16 else _UNPACK_FP16
    inner = tl.program_id(0) * BN
    first_k = tl.program_id(1) * BK
    piece, thread = tl.arange(0, A * B)[:, None, None], tl.arange(0, 128)[None, :, None]
    j = tl.arange(0, 4)[None, None, :]
    across = padded(K) // 64
    tile = ((first_row + inner) // 64).to(tl.int64) * across + first_k // 64
    q_ptrs = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tile * 512
    q = tl.load(q_ptrs + ((piece % A * across + piece // A) * 512 + thread * 4 + j), eviction_policy="evict_first")
    n = first_row + inner + (piece % A * 64 + thread // 32 * 16 + thread // 4 % 8)
    if ORDER == 80:
        n += j % 2 * 8
    row = 0
    if GROUP % BK == 0:  # one scale for the columns of a program
        row = first_k // GROUP * padded(N) if GROUP else 0
    elif ORDER == 90:
        row = (first_k + piece // A * 64 + j * 16) // GROUP * padded(N)
    else:
        row = (first_k + piece // A * 64 + j // 2 * 32) // GROUP * padded(N)
    scale_ptr, zero_ptr = scales_of(w_ptr, N, K, 4, SCALES), zeros_of(w_ptr, N, K, 4, SCALES, GROUP)
    scale0, zero0 = _scale_and_zero(scale_ptr, zero_ptr, n + row, ASYM, SCALES)
    scale1, zero1 = scale0, zero0
    if ORDER == 90:
        scale1, zero1 = _scale_and_zero(scale_ptr, zero_ptr, n + row + 8, ASYM, SCALES)
    a, b, c, d = _unpack(q, scale0, scale1, zero0, zero1, ASM)
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # the field's bits, low one last
    if ORDER == 90:  # B A, w lh ll j | r rh -> A w rh lh, B j r ll
        pairs = pairs.reshape(B, A, 4, 8, 4, 4, 2, 2).permute(1, 2, 7, 3, 0, 5, 6, 4)
    else:  # B A, w lh ll jt jr | r eh -> A w jr lh, B jt ll r eh
        pairs = pairs.reshape(B, A, 4, 8, 4, 2, 2, 2, 2).permute(1, 2, 6, 3, 0, 5, 4, 7, 8)
    out_ptrs = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + inner.to(tl.int64) * (K // 2) + first_k // 2
    k = tl.arange(0, BK // 2)[None, :]
    out_ptrs += tl.arange(0, BN)[:, None] * (K // 2) + k
    if EVEN_K:
        tl.store(out_ptrs, pairs.reshape(BN, BK // 2))
    else:
        tl.store(out_ptrs, pairs.reshape(BN, BK // 2), mask=first_k // 2 + k < K // 2)
