"""The product with folded tiles: the scale is multiplied into the weight, the tensor cores accumulate in place.

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
from ptq_kernels.triton.pointers import load_x, padded, scales_of, tile_pointers, zeros_of
from ptq_kernels.triton.splits import own_steps, own_tile, store


@triton.jit
def _product(w, x, acc, USE_ASM: tl.constexpr):
    if not USE_ASM:
        x, w = x.to(tl.float32), w.to(tl.float32)  # the interpreter multiplies the bit patterns of bfloat16
    return tl.dot(w, x, acc, input_precision="ieee")


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
    row = (row // GROUP if GROUP else row * 0) * width  # in 32 bits: no weight has 2**31 scales
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
    parts_ptr,  # float32 [splits, M, N]; not used unless SPLIT without a cluster
    counters_ptr,  # int32, one for each tile of y, 0 before and after; not used unless SPLIT without a cluster
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
    SIZE: tl.constexpr,  # of the cluster of programs that share a tile; 1: none
    EVEN_K: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,  # bytes of each row of tiles to ask for before the kernel before has ended; 0: wait at once
    USE_ASM: tl.constexpr,  # False in the interpreter, which knows no assembly
):
    """Tile ``[BN, BM]`` of y.T, or a part. Program ids: tile (M fastest), split; of clusters one, the split fastest."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tl.static_assert(GROUP % (BK // 4) == 0)
    HALF: tl.constexpr = BK // 2  # a step is two products: the second half is unpacked while the first is multiplied
    PARTS: tl.constexpr = 1 if GROUP % HALF == 0 else 2  # of a half, with scales of their own
    SPAN: tl.constexpr = HALF // PARTS
    SHARED: tl.constexpr = GROUP % BK == 0  # the halves have the same scales
    pn, m, n = own_tile(M, BM, BN, SIZE)
    first, count = own_steps(K, BK, SPLIT, SIZE)
    begin(w_ptr, pn * (BN // 64), first * (BK // 64), count, N, K, BITS, GROUP, SCALES, ASYM, BN, BK, AHEAD)
    q_ptrs = tile_pointers(w_ptr, pn * (BN // 64), first * (BK // 64), N, K, BITS, BN, HALF)
    k = first * BK + tl.arange(0, HALF)
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + k[:, None]  # rows beyond M are not stored
    width = padded(N)
    own = tl.minimum(n, width - 1) if BN > 128 else n  # which N is padded to
    scale_ptr = scales_of(w_ptr, N, K, BITS, SCALES)
    zero_ptr = zeros_of(w_ptr, N, K, BITS, SCALES, GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    q_offset, x_offset = 0, 0
    last = tl.cdiv(K, BK) - 1
    scale, zero = _scales(scale_ptr, zero_ptr, own, first * BK, width, GROUP, PARTS, SPAN, ASYM)
    scale1, zero1 = scale, zero
    if not SHARED:
        scale1, zero1 = _scales(scale_ptr, zero_ptr, own, first * BK + HALF, width, GROUP, PARTS, SPAN, ASYM)
    for i in range(count):
        q = tl.load(q_ptrs + q_offset, eviction_policy="evict_first")
        q1 = tl.load(q_ptrs + q_offset + HALF * (8 * BITS), eviction_policy="evict_first")
        x = load_x(x_ptrs + x_offset, k + x_offset, m, K, EVEN_K, False)
        x1 = load_x(x_ptrs + x_offset + HALF, k + x_offset + HALF, m, K, EVEN_K, False)
        w = _weight(q, scale, zero, BITS, ORDER, BN, HALF, PARTS, ASYM, DTYPE, USE_ASM)
        acc = _product(w, x, acc, USE_ASM)
        w = _weight(q1, scale1, zero1, BITS, ORDER, BN, HALF, PARTS, ASYM, DTYPE, USE_ASM)
        acc = _settled(_product(w, x1, acc, USE_ASM), USE_ASM)
        # Triton pipelines only the loads that feed the product: the next scales are fetched one step ahead by hand.
        after = tl.minimum(first + i + 1, last) * BK
        scale, zero = _scales(scale_ptr, zero_ptr, own, after, width, GROUP, PARTS, SPAN, ASYM)
        scale1, zero1 = scale, zero
        if not SHARED:
            scale1, zero1 = _scales(scale_ptr, zero_ptr, own, after + HALF, width, GROUP, PARTS, SPAN, ASYM)
        q_offset += BK * (8 * BITS)
        x_offset += BK
    store(acc, b_ptr, y_ptr, parts_ptr, counters_ptr, m, n, M, N, HAS_BIAS, SPLIT, SIZE)
