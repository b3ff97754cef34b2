"""The product with pipelined tiles, for Hopper: one part of the weight is unpacked while the one before is multiplied.

Plain Triton waits for every product whose weight comes from registers before those registers may be written again.
Here the order is spelled out, in Gluon, Triton's language of explicit layouts and asynchronous operations: two sets of
operand registers take turns, and a product is waited for only after the next one is queued behind it. The copy engine
(TMA) brings x and the packed weight into a ring of stages in shared memory, with a barrier for each stage; one thread
asks for it, so that loads cost few instructions. Rows of x beyond M and columns beyond K come as zeros.

As in wide.py each weight is integer times scale, rounded once to the dtype of x.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and gluon.jit carries no annotations)
# ruff: noqa: RET505
# (Triton compiles what follows a return)

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ptq_kernels.triton.ahead import ask_for, ask_for_groups, depend, groups_of
from ptq_kernels.triton.clusters import own_steps
from ptq_kernels.triton.fragments import codes4_of_words, raised_zero
from ptq_kernels.triton.pointers import padded, scales_of, zeros_of
from ptq_kernels.triton.shares import finish

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9 renamed it
_WORDS = gl.constexpr(512)  # int32 of a tile of 64 x 64 codes
_LINE = gl.constexpr(128)  # bytes that one prefetch brings


@cache
def x_layout() -> gl.NVMMASharedLayout:
    """How a stage of x lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@cache
def q_layout() -> gl.NVMMASharedLayout:
    """How a stage of the packed weight lies in shared memory: as in memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _words_layout(rows, warps):
    """Words ``[rows, 512]`` of tiles: four consecutive ones a thread, a tile a warp group, as a product wants them."""
    groups = warps // 4
    down = [[groups << i, 0] for i in range((rows // groups).bit_length() - 1)]
    across = [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *down], lanes, [[0, 128], [0, 256], *across], [], [rows, _WORDS.value]
    )


@gluon.jit
def _scaled(t, scale, zero, ASYM: gl.constexpr, DTYPE: gl.constexpr):
    """(raised codes - raised zeros) * scale in DTYPE. In assembly: LLVM would pair the values of a register anew."""
    if ASYM:
        zero = raised_zero(zero, 4, DTYPE, True)
        if gl.bfloat16 == DTYPE:
            return gl.inline_asm_elementwise(
                "{ .reg .b32 a; sub.bf16x2 a, $1, $3; mul.bf16x2 $0, a, $2; }", "=r,r,r,r", [t, scale, zero],
                dtype=gl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return gl.inline_asm_elementwise(
                "{ .reg .b32 a; sub.f16x2 a, $1, $3; mul.f16x2 $0, a, $2; }", "=r,r,r,r", [t, scale, zero],
                dtype=gl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    elif gl.bfloat16 == DTYPE:  # less 136
        return gl.inline_asm_elementwise(
            "{ .reg .b32 a, b; mov.b32 b, 0x43084308; sub.bf16x2 a, $1, b; mul.bf16x2 $0, a, $2; }", "=r,r,r",
            [t, scale], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:  # less 72
        return gl.inline_asm_elementwise(
            "{ .reg .b32 a, b; mov.b32 b, 0x54805480; sub.f16x2 a, $1, b; mul.f16x2 $0, a, $2; }", "=r,r,r",
            [t, scale], dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def _weight(q, scale, zero, LAYOUT: gl.constexpr, ASYM: gl.constexpr, DTYPE: gl.constexpr):
    """Words ``[tiles, 512 or 256]`` of 64 or 32 columns -> those columns of the weight, ``[64 tiles, 64 or 32]``."""
    TILES: gl.constexpr = q.shape[0]
    HALVES: gl.constexpr = q.shape[1] // 256
    # tiles, w lh ll h, kk | j r rh -> tiles, w rh lh | h j r ll kk
    t = codes4_of_words(q, DTYPE).reshape(TILES, 4, 8, 4, HALVES, 2, 2, 2, 2)
    t = t.permute(0, 1, 8, 2, 4, 6, 7, 3, 5).reshape(TILES * 64, HALVES * 32)
    t = gl.convert_layout(t, LAYOUT, assert_trivial=True)  # only renames registers
    return _scaled(t, gl.expand_dims(scale, 1), gl.expand_dims(zero, 1), ASYM, DTYPE)


@gluon.jit
def _halves(words, BK: gl.constexpr, LAYOUT: gl.constexpr):
    """A step of packed weight in shared memory -> its first and its second half."""
    if BK == 128:
        return words.slice(0, _WORDS, 1).load(LAYOUT), words.slice(_WORDS, _WORDS, 1).load(LAYOUT)
    else:
        q = words.load(LAYOUT)
        first, second = gl.split(q.reshape(q.shape[0], 128, 2, 2).permute(0, 1, 3, 2))
        return first.reshape(q.shape[0], 256), second.reshape(q.shape[0], 256)


@gluon.jit
def _scales(scale_ptrs, zero_ptrs, column, width, GROUP: gl.constexpr, ASYM: gl.constexpr):
    """Scales and zeros of a column; without zeros the second one is the first and not used."""
    row = column // GROUP * width if GROUP else 0
    scale = gl.load(scale_ptrs + row)
    zero = scale
    if ASYM:
        zero = gl.load(zero_ptrs + row)
    return scale, zero


@gluon.jit
def _ring(x_desc, q_desc, STAGES: gl.constexpr):
    """Stages of x and of the packed weight in shared memory, and the barriers that say when one is full."""
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, x_desc.block_shape[0], x_desc.block_shape[1]], x_desc.layout)
    qs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, q_desc.block_shape[0], q_desc.block_shape[1]], q_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    return xs, qs, full


@gluon.jit
def _fetch(x_desc, q_desc, full, xs, qs, slot, m, n, step, wanted, BK: gl.constexpr):
    """Ask for a step of x and of the weight, into a slot, if it is wanted."""
    mbarrier.expect(full.index(slot), 2 * xs.shape[1] * BK + 4 * qs.shape[1] * qs.shape[2], pred=wanted)
    _load(q_desc, [n, step * (BK // 64 * _WORDS)], full.index(slot), qs.index(slot), pred=wanted)
    _load(x_desc, [m, step * BK], full.index(slot), xs.index(slot), pred=wanted)


@gluon.jit
def _begin(w_ptr, first_n, first_k, steps, N, K, GROUP: gl.constexpr, SCALES: gl.constexpr, ASYM: gl.constexpr,
           BN: gl.constexpr, BK: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
    """As `begin` of ahead.py, with layouts."""
    if AHEAD:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
        down = first_n + gl.arange(0, BN // 64, gl.SliceLayout(1, LAYOUT))
        down = gl.minimum(down, padded(N) // 64 - 1)
        row = w_ptr + ((down.to(gl.int64) * (padded(K) // 64) + first_k) * (4 * _WORDS))[:, None]
        own = gl.minimum(steps * (BK * 32), AHEAD)
        at = gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
        for start in range(0, own, 128 * _LINE):
            ask_for(row + gl.minimum(start + at * _LINE, own - _LINE)[None, :])
        first, count = groups_of(first_k * 64, steps * BK, GROUP)
        ask_for_groups(scales_of(w_ptr, N, K, 4, SCALES), at, first_n * 64, first, count, padded(N), BN)
        if ASYM:
            ask_for_groups(zeros_of(w_ptr, N, K, 4, SCALES, GROUP), at, first_n * 64, first, count, padded(N), BN)
        depend()


@gluon.jit(do_not_specialize=["M"])
def pipelined_kernel(
    x_desc,  # of x [M, K], bfloat16 or float16, in blocks [BM, BK]
    q_desc,  # of the tiles at w_ptr as int32 [N / 64, 8 K], padded, in blocks [BN / 64, 8 BK]
    w_ptr,  # uint8, see tiles.py
    b_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N], as x
    M,
    N,
    K,
    GROUP: gl.constexpr,  # group size; 0: one group
    SCALES: gl.constexpr,  # dtype of the scales, that of x
    ASYM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SIZE: gl.constexpr,  # of the cluster of programs that share a tile; 1: none
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,  # bytes of each row of tiles to ask for before the kernel before has ended; 0: wait at once
):
    """Tile ``[BN, BM]`` of y.T, or a part of it; program ids: tile (M fastest) and, faster, part."""
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    HALF: gl.constexpr = BK // 2  # a step is two products
    SHARED: gl.constexpr = GROUP % BK == 0  # by which one scale
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    QUARTER: gl.constexpr = _words_layout(BN // 64, gl.num_warps())
    gl.static_assert(GROUP % HALF == 0)
    gl.static_assert(SCALES == DTYPE)
    gl.static_assert(STAGES >= 2)  # a step is asked for while the next one is awaited
    across = (M + BM - 1) // BM
    tile, rank = gl.program_id(0) // SIZE, gl.program_id(0) % SIZE
    first_n, first_m = tile // across * BN, tile % across * BM
    first, count = own_steps(K, BK, SIZE)
    xs, qs, full = _ring(x_desc, q_desc, STAGES)
    _begin(w_ptr, first_n // 64, first * (BK // 64), count, N, K, GROUP, SCALES, ASYM, BN, BK, AHEAD)
    for s in gl.static_range(STAGES):
        _fetch(x_desc, q_desc, full, xs, qs, s, first_m, first_n // 64, first + s, s < count, BK)
    width = padded(N)
    n = gl.minimum(first_n + gl.arange(0, BN, gl.SliceLayout(1, OPERAND)), width - 1)
    scale_ptrs = scales_of(w_ptr, N, K, 4, SCALES) + n
    zero_ptrs = zeros_of(w_ptr, N, K, 4, SCALES, GROUP) + n
    scale, zero = _scales(scale_ptrs, zero_ptrs, first * BK, width, GROUP, ASYM)
    scale1, zero1 = scale, zero
    if not SHARED:
        scale1, zero1 = _scales(scale_ptrs, zero_ptrs, first * BK + HALF, width, GROUP, ASYM)
    # The first product is before the loop: an accumulator that the loop entered as zeros would be moved in between.
    mbarrier.wait(full.index(0), 0)
    q, q1 = _halves(qs.index(0), BK, QUARTER)
    even = _weight(q, scale, zero, OPERAND, ASYM, DTYPE)
    odd = even
    acc = warpgroup_mma_init(gl.zeros((BN, BM), gl.float32, MMA))
    acc = warpgroup_mma(even, xs.index(0).slice(0, HALF, 1).permute((1, 0)), acc, use_acc=False, is_async=True)
    for i in range(count - 1):
        next_scale, next_zero = _scales(scale_ptrs, zero_ptrs, (first + i + 1) * BK, width, GROUP, ASYM)
        x = xs.index(i % STAGES)
        odd = _weight(q1, scale1, zero1, OPERAND, ASYM, DTYPE)
        acc = warpgroup_mma(odd, x.slice(HALF, HALF, 1).permute((1, 0)), acc, is_async=True)
        acc, even = warpgroup_mma_wait(1, deps=(acc, even))
        scale, zero = next_scale, next_zero
        scale1, zero1 = scale, zero
        if not SHARED:
            scale1, zero1 = _scales(scale_ptrs, zero_ptrs, (first + i + 1) * BK + HALF, width, GROUP, ASYM)
        slot = (i + 1) % STAGES
        mbarrier.wait(full.index(slot), (i + 1) // STAGES & 1)
        q, q1 = _halves(qs.index(slot), BK, QUARTER)
        even = _weight(q, scale, zero, OPERAND, ASYM, DTYPE)
        acc = warpgroup_mma(even, xs.index(slot).slice(0, HALF, 1).permute((1, 0)), acc, is_async=True)
        acc, odd = warpgroup_mma_wait(1, deps=(acc, odd))
        acc = warpgroup_mma_init(acc)
        # no product reads the slot of step i any more
        more = i + STAGES < count
        _fetch(x_desc, q_desc, full, xs, qs, i % STAGES, first_m, first_n // 64, first + i + STAGES, more, BK)
    odd = _weight(q1, scale1, zero1, OPERAND, ASYM, DTYPE)
    x = xs.index((count - 1) % STAGES).slice(HALF, HALF, 1).permute((1, 0))
    acc = warpgroup_mma(odd, x, acc, is_async=True)
    acc, even, odd = warpgroup_mma_wait(0, deps=(acc, even, odd))
    finish(acc, full, b_ptr, y_ptr, rank, first_m, first_n, M, N, HAS_BIAS, SIZE, BM, BN)
