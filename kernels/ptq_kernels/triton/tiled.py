"""The product with fragment-order tiles: y.T = W x.T, so that the unpacked weight is the register operand.

The codes stay exact small integers; the group's scale multiplies the float32 accumulator, once a step. That form waits
for the product in every step, which is what keeps it right with Triton 3.6: accumulating in place lets its assembler
write operand registers that an asynchronous wgmma may still read.

With raised tiles, for few rows, nothing is subtracted from a code: raised by a power of two it is an exact integer as
well. What the product has too much, that power and the zero times the sum of the columns of x, is subtracted from the
float32 product. The sum is a product of ones with x, by tensor cores that few rows leave idle. It saves an instruction
for two weights, where instructions are what the kernel has no time for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# ruff: noqa: RET505, SIM300
# (Triton compiles what follows a return, and compares a constexpr by its own method)

import triton
import triton.language as tl

from ptq_kernels.triton.ahead import ask, depend
from ptq_kernels.triton.fragments import centered, half_tiles, raise_of, raised_codes, raised_zero
from ptq_kernels.triton.pointers import load_x, padded, scale_and_zero, scale_pointers, tile_pointers
from ptq_kernels.triton.splits import own_steps, own_tile, store


@triton.jit
def _product(t, x, scale, USE_ASM: tl.constexpr):
    if not USE_ASM:
        x = x.to(tl.float32)  # the interpreter multiplies the bit patterns of bfloat16
    return tl.dot(t, x, input_precision="ieee") * scale.to(tl.float32)[:, None]


@triton.jit
def _ones(BK: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """``[64, BK]``. Where the compiler knows the values it makes them anew for every product, by four instructions."""
    if not USE_ASM:
        return tl.full((64, BK), 1.0, tl.float32)
    else:
        bits = tl.zeros((1, 1), tl.int32) + (0x3C00 if DTYPE != tl.bfloat16 else 0x3F80)
        one = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=False, pack=1)
        return tl.broadcast_to(one.to(tl.int16).to(DTYPE, bitcast=True), (64, BK))


@triton.jit
def _part(q, x, scale, zero, ones, BITS: tl.constexpr, ORDER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
          PART: tl.constexpr, ASYM: tl.constexpr, RAISED: tl.constexpr, USE_ASM: tl.constexpr):  # fmt: skip
    """The scaled product of columns that share a scale, in float32 ``[BN, BM]``."""
    DTYPE: tl.constexpr = x.dtype
    t = raised_codes(q, BITS, ORDER, BN, PART, DTYPE, USE_ASM)
    if not RAISED:
        return _product(centered(t, zero, BITS, ASYM, DTYPE, USE_ASM), x, scale, USE_ASM)
    else:
        if not USE_ASM:
            x = x.to(tl.float32)
        total = tl.dot(t, x, input_precision="ieee")
        sums = tl.dot(ones, x, input_precision="ieee").reshape(1, 64, BM)  # the same in all 64 rows
        sums = tl.broadcast_to(sums, (BN // 64, 64, BM)).reshape(BN, BM)
        if ASYM:
            raised = raised_zero(zero, BITS, DTYPE, USE_ASM).to(tl.float32)[:, None]
        else:
            raised = raise_of(BITS, DTYPE) + 2 ** (BITS - 1)
        return (total - sums * raised) * scale.to(tl.float32)[:, None]


@triton.jit
def _rows_ahead(step, width, BK: tl.constexpr, GROUP: tl.constexpr):
    """From the scales of the step before to those of a step."""
    if BK % GROUP == 0:
        return width * (BK // GROUP)
    else:
        return (step * BK // GROUP - (step - 1) * BK // GROUP) * width


@triton.jit
def _second_row(step, width, BK: tl.constexpr, GROUP: tl.constexpr):
    """From the scales of a step's first half to those of its second."""
    if GROUP == 0 or GROUP % BK == 0:
        return width * 0
    elif BK % GROUP == 0:
        return width
    else:
        return ((step * BK + BK // 2) // GROUP - step * BK // GROUP) * width


@triton.jit(do_not_specialize=["M"])
def tiled_kernel(
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
    RAISED: tl.constexpr,  # a raised tile, of 4 bits
    AHEAD: tl.constexpr,  # bytes of each row of tiles to ask for before the kernel before has ended; 0: wait at once
    USE_ASM: tl.constexpr,  # False in the interpreter, which knows no assembly
):
    """Tile ``[BN, BM]`` of y.T, or a part. Program ids: tile (M fastest), split; of clusters one, the split fastest."""
    HALVES: tl.constexpr = GROUP % BK != 0  # the halves of a step may be of two groups
    tl.static_assert(GROUP % (BK // 2) == 0)  # two scales a step at most
    PART: tl.constexpr = BK // 2 if HALVES else BK  # columns that share a scale
    MASK_M: tl.constexpr = BM < 64
    LOADS: tl.constexpr = 2 if HALVES and (PART == 64 or BITS == 8) else 1  # of the weight, in a step
    pn, m, n = own_tile(M, BM, BN, SIZE)
    first, count = own_steps(K, BK, SPLIT, SIZE)
    ask(w_ptr, pn * (BN // 64), first * (BK // 64), count, N, K, BITS, GROUP, SCALES, ASYM, BN, BK, AHEAD)
    ones = _ones(PART, x_ptr.dtype.element_ty, USE_ASM) if RAISED else 0.0  # takes long enough to be done meanwhile
    if AHEAD:
        depend()
    in_m, width = m < M, padded(N)
    scale_ptrs, zero_ptrs = scale_pointers(w_ptr, n, first * BK, N, K, BITS, SCALES, GROUP, BN)
    q_ptrs = tile_pointers(w_ptr, pn * (BN // 64), first * (BK // 64), N, K, BITS, BN, BK // LOADS)
    k = first * BK + tl.arange(0, PART)
    # Many rows: those beyond M read the last one and are not stored, as a mask costs three instructions a copy. Few
    # rows: a mask, as memory that is not needed costs more.
    row_of_x = m if MASK_M else tl.minimum(m, M - 1)
    x_ptrs = x_ptr + row_of_x.to(tl.int64)[None, :] * K + k[:, None]
    # Pointers stay and offsets of 32 bits move: one instruction a copy instead of three.
    q_offset, x_offset = 0, 0
    acc = tl.zeros((BN, BM), tl.float32)
    second = _second_row(first, width, BK, GROUP)
    scale, zero = scale_and_zero(scale_ptrs, zero_ptrs, ASYM)
    if HALVES:
        scale1, zero1 = scale_and_zero(scale_ptrs + second, zero_ptrs + second, ASYM)
    for i in range(count):
        q = tl.load(q_ptrs + q_offset, eviction_policy="evict_first")
        x = load_x(x_ptrs + x_offset, k + x_offset, in_m, K, EVEN_K, MASK_M)
        if HALVES:
            x1 = load_x(x_ptrs + x_offset + PART, k + x_offset + PART, in_m, K, EVEN_K, MASK_M)
            if LOADS == 2:
                q1 = tl.load(q_ptrs + q_offset + PART * (8 * BITS), eviction_policy="evict_first")
        # Triton pipelines only the loads that feed the product: the next scales are fetched one step ahead by hand.
        # After the last step that reads the extra rows of the layout.
        next_scale, next_zero = scale, zero
        if GROUP:
            step = first + i + 1
            second = _second_row(step, width, BK, GROUP)
            ahead = _rows_ahead(step, width, BK, GROUP)
            scale_ptrs += ahead
            zero_ptrs += ahead
            next_scale, next_zero = scale_and_zero(scale_ptrs, zero_ptrs, ASYM)
        if HALVES:
            if LOADS == 1:
                q, q1 = half_tiles(q, BN // 64)
            acc += _part(q1, x1, scale1, zero1, ones, BITS, ORDER, BN, BM, PART, ASYM, RAISED, USE_ASM)
            scale1, zero1 = scale_and_zero(scale_ptrs + second, zero_ptrs + second, ASYM)
        acc += _part(q, x, scale, zero, ones, BITS, ORDER, BN, BM, PART, ASYM, RAISED, USE_ASM)
        q_offset += BK * (8 * BITS)
        x_offset += BK
        scale, zero = next_scale, next_zero
    store(acc, b_ptr, y_ptr, parts_ptr, counters_ptr, m, n, M, N, HAS_BIAS, SPLIT, SIZE)
