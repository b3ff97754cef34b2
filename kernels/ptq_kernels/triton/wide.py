"""The product for many rows: the scale is multiplied into the weight, and the tensor cores accumulate in place.

Each weight is formed as cuBLAS would get it, integer times scale rounded once to the dtype of x. Without a second
accumulator for what a step adds, a tile of 64 rows leaves room for two programs on a multiprocessor, one of which
unpacks while the other multiplies; and a tile of 256 weight rows reads x half as often as one of 128.

The accumulator passes through an empty instruction in every step. It makes the compiler wait for the product there:
otherwise Triton 3.6 lets the next step write operand registers that an asynchronous wgmma may still read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)

import triton
import triton.language as tl

from ptq_kernels.triton.ahead import begin
from ptq_kernels.triton.fragments import centered, raised_codes
from ptq_kernels.triton.pointers import padded, scales_of, tile_pointers, zeros_of
from ptq_kernels.triton.splits import own_steps, own_tile, store


@triton.jit
def _settled(acc, USE_ASM: tl.constexpr):
    """The same values, after the product that makes them has ended."""
    if USE_ASM:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc


@triton.jit
def _scales(scale_ptr, zero_ptr, n, first_k, width, GROUP: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
            ASYM: tl.constexpr):  # fmt: skip
    """Scales and zeros ``[BN, PARTS]`` of the columns from first_k on."""
    row = first_k + tl.arange(0, PARTS) * SPAN
    row = (row // GROUP if GROUP else row * 0) * width  # fewer than 2**31 scales are beyond any weight
    at = n[:, None] + row[None, :]
    scale = tl.load(scale_ptr + at)
    zero = scale
    if ASYM:
        zero = tl.load(zero_ptr + at)
    return scale, zero


@triton.jit
def _weight(q, scale, zero, BITS: tl.constexpr, ORDER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            PARTS: tl.constexpr, ASYM: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):  # fmt: skip
    """Packed tiles -> the weight ``[BN, BK]`` in DTYPE."""
    t = raised_codes(q, BITS, ORDER, BN, BK, DTYPE, USE_ASM).reshape(BN, PARTS, BK // PARTS)
    t = centered(t, zero, BITS, ASYM, DTYPE, USE_ASM)
    if USE_ASM and scale.dtype == DTYPE:
        t = t * scale[:, :, None]  # exact before it is rounded, as a float32 product would be
    else:
        t = (t.to(tl.float32) * scale.to(tl.float32)[:, :, None]).to(DTYPE)
    return t.reshape(BN, BK)


@triton.jit(do_not_specialize=["M"])
def wide_kernel(
    x_ptr,  # [M, K] bfloat16 or float16
    w_ptr,  # uint8, see tiles.py
    b_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N], as x
    parts_ptr,  # float32 [splits, M, N]; not used unless SPLIT
    counters_ptr,  # int32, one for each tile of y, 0 before and after; not used unless SPLIT
    M,
    N,
    K,
    BITS: tl.constexpr,  # 4 or 8
    ORDER: tl.constexpr,  # 90 or 80
    GROUP: tl.constexpr,  # group size; 0: one group
    SCALES: tl.constexpr,  # dtype of the scales
    ASYM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,  # bytes of each row of tiles to ask for before the kernel before has ended; 0: wait at once
    USE_ASM: tl.constexpr,  # False in the interpreter, which knows no assembly
):
    """Tile ``[BN, BM]`` of y.T, or a part of it; program ids: tile (M fastest), split. BK / 4 divides the group."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tl.static_assert(GROUP % (BK // 4) == 0)
    PARTS: tl.constexpr = 1 if GROUP % BK == 0 else 2 if GROUP % (BK // 2) == 0 else 4  # that have scales of their own
    pn, m, n = own_tile(M, BM, BN)
    first, count = own_steps(K, BK, SPLIT)
    begin(w_ptr, pn * (BN // 64), first * (BK // 64), count, N, K, BITS, BN, BK, AHEAD)
    q_ptrs = tile_pointers(w_ptr, pn * (BN // 64), first * (BK // 64), N, K, BITS, BN, BK)
    k = first * BK + tl.arange(0, BK)
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + k[:, None]  # rows beyond M are not stored
    width = padded(N)
    own = tl.minimum(n, width - 1) if BN > 128 else n  # which N is padded to
    scale_ptr = scales_of(w_ptr, N, K, BITS, SCALES)
    zero_ptr = zeros_of(w_ptr, N, K, BITS, SCALES, GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    q_offset, x_offset = 0, 0
    last = tl.cdiv(K, BK) - 1
    scale, zero = _scales(scale_ptr, zero_ptr, own, first * BK, width, GROUP, PARTS, BK // PARTS, ASYM)
    for i in range(count):
        q = tl.load(q_ptrs + q_offset, eviction_policy="evict_first")
        if EVEN_K:
            x = tl.load(x_ptrs + x_offset, eviction_policy="evict_last")
        else:
            x = tl.load(x_ptrs + x_offset, mask=(k + x_offset < K)[:, None], other=0.0, eviction_policy="evict_last")
        # Triton pipelines only the loads that feed the product: the next scales are fetched one step ahead by hand.
        after = tl.minimum(first + i + 1, last) * BK
        next_scale, next_zero = _scales(scale_ptr, zero_ptr, own, after, width, GROUP, PARTS, BK // PARTS, ASYM)
        w = _weight(q, scale, zero, BITS, ORDER, BN, BK, PARTS, ASYM, DTYPE, USE_ASM)
        if not USE_ASM:
            x, w = x.to(tl.float32), w.to(tl.float32)  # the interpreter multiplies the bit patterns of bfloat16
        acc = _settled(tl.dot(w, x, acc, input_precision="ieee"), USE_ASM)
        q_offset += BK * (8 * BITS)
        x_offset += BK
        scale, zero = next_scale, next_zero
    store(acc, b_ptr, y_ptr, parts_ptr, counters_ptr, m, n, M, N, HAS_BIAS, SPLIT)
