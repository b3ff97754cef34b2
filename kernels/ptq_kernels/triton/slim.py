"""The product of few rows, for Hopper: a program takes whole rows of the weight, its warps share the columns.

What a split product of few rows spends its time on is not the weight but what follows it: parts of programs that have
to be added. Here no program waits for another one. Each warp multiplies its own columns, with the tensor cores'
instruction for one warp (mma.sync), straight from the packed weight in registers: a warp of a "tile_sm90" tile holds 16
weight rows as that instruction wants them, too. The warps' parts are added at the end, in their order, through shared
memory. x, the packed weight, its scales and zeros come through a ring of stages there: what came straight to registers
would be awaited in the step that asks for it, at whose end the compiler moves it to the registers of the next one.

As of raised tiles (tiled.py) nothing is subtracted from a code; what the product has too much, that power of two and
the zero times the sum of x, a product of ones with x, is subtracted from the float32 product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and gluon.jit carries no annotations)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ptq_kernels.triton.ahead import ask_for, ask_for_groups, depend, groups_of
from ptq_kernels.triton.fragments import codes4_of_words, raise_of, raised_zero
from ptq_kernels.triton.pointers import padded, scales_of, zeros_of

_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9 renamed it
_WORDS = gl.constexpr(512)  # int32 of a tile of 64 x 64 codes
_LINE = gl.constexpr(128)  # bytes that one prefetch brings


@gluon.constexpr_function
def _words_layout(pieces, warps):
    """Words ``[warps, pieces, 128]`` of pieces of 16 rows x 64 columns: four consecutive ones a thread."""
    down = [[0, 1 << i, 0] for i in range(pieces.bit_length() - 1)]
    lanes = [[0, 0, 4 << i] for i in range(5)]
    across = [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], *down], lanes, across, [], [warps, pieces, 128])


@gluon.jit
def _begin(w_ptr, scale_ptr, zero_ptr, first_n, N, K, BN: gl.constexpr, GROUP: gl.constexpr, ASYM: gl.constexpr,
           AHEAD: gl.constexpr):  # fmt: skip
    """As `begin` of ahead.py, for the first AHEAD bytes of a program's rows."""
    if AHEAD:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        PIECE: gl.constexpr = BN * 32 // _LINE  # lines of a program in a tile
        lines = gl.minimum(padded(K) // 64 * PIECE, AHEAD // _LINE)
        own = w_ptr + ((first_n // 64).to(gl.int64) * (padded(K) // 64) * (4 * _WORDS) + first_n % 64 * 32)
        for start in range(0, lines, 32 * gl.num_warps()):
            line = gl.minimum(start + gl.arange(0, 32 * gl.num_warps(), LAYOUT), lines - 1)
            ask_for(own + (line // PIECE * (4 * _WORDS) + line % PIECE * _LINE))
        at = gl.arange(0, 128, LAYOUT)
        first, count = groups_of(0, K, GROUP)
        ask_for_groups(scale_ptr, at, first_n, first, count, padded(N), BN)
        if ASYM:
            ask_for_groups(zero_ptr, at, first_n, first, count, padded(N), BN)
        depend()


@gluon.jit
def _x_pointers(x_ptr, first_m, K, BM: gl.constexpr, WIDTH: gl.constexpr):
    """Pointers ``[warps, BM, WIDTH]`` to the first step of rows first_m.. of x, and the rows."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 2, 16], [WARPS, 1, 1], [2, 1, 0])
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    m = first_m + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    k = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return x_ptr + (m.to(gl.int64) * K + (warp * WIDTH + k)), m


@gluon.jit
def _word_pointers(w_ptr, first_n, K, BN: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Pointers ``[warps, pieces, 128]`` to the words of the first step; of the pieces the row varies fastest."""
    piece = gl.arange(0, BN * WIDTH // 1024, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    first = (first_n // 64).to(gl.int64) * (padded(K) // 64) * _WORDS + first_n % 64 * 8
    within = piece % (BN // 16) * 128 + (piece // (BN // 16) + warp * (WIDTH // 64)) * _WORDS + word
    return w_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + first + within


@gluon.jit
def _group_pointers(base, first_n, BN: gl.constexpr):
    """Pointers ``[warps, BN]`` to the scales, or the zeros, of the first group, 16 bytes a thread; and the warps."""
    EACH: gl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, EACH], [1, 32], [gl.num_warps(), 1], [1, 0])
    n = first_n + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))[None, :]
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, LAYOUT))[:, None]
    return base + (n + warp * 0), warp


@gluon.jit
def _fetch(ring, sources, warps, in_m, slot, step, width, BK: gl.constexpr, GROUP: gl.constexpr, ASYM: gl.constexpr):
    """Ask for a step of the weight, of x, and of scales and zeros, of which each warp's columns have one a row.

    Rows of x beyond M are zeros, and their products are not stored.
    """
    q_ptrs, x_ptrs, scale_ptrs, zero_ptrs = sources
    qs, xs, scales, zeros = ring
    warp, warp_of_zeros = warps
    WIDTH: gl.constexpr = BK // gl.num_warps()
    _copy(qs.index(slot), q_ptrs + step * (BK // 64 * _WORDS))
    group, group_of_zeros = warp * 0, warp_of_zeros * 0
    if GROUP:
        group = (step * BK + warp * WIDTH) // GROUP * width
        group_of_zeros = (step * BK + warp_of_zeros * WIDTH) // GROUP * width
    _copy(scales.index(slot), scale_ptrs + group)
    if ASYM:
        _copy(zeros.index(slot), zero_ptrs + group_of_zeros)
    _copy(xs.index(slot), x_ptrs + step * BK, mask=in_m)
    async_copy.commit_group()


@gluon.jit
def _ones(WIDTH: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """``[warps, 16, WIDTH]``."""
    bits = gl.full([gl.num_warps(), 16, WIDTH], 0x3F80 if gl.bfloat16 == DTYPE else 0x3C00, gl.int16, LAYOUT)
    return bits.to(DTYPE, bitcast=True)


@gluon.jit
def _product(q, x, scale, zero, ones, BN: gl.constexpr, ASYM: gl.constexpr, MMA: gl.constexpr):
    """The scaled product of a step of each warp, in float32 ``[warps, BN, BM]``."""
    WARPS: gl.constexpr = q.shape[0]
    ROWS: gl.constexpr = BN // 16
    BM: gl.constexpr = x.shape[2]
    DTYPE: gl.constexpr = x.dtype
    # warps, B A, lh ll h kk | j r rh -> warps, A rh lh, B h j r ll kk
    t = codes4_of_words(q, DTYPE).reshape(WARPS, q.shape[1] // ROWS, ROWS, 8, 4, 2, 2, 2, 2, 2)
    t = t.permute(0, 2, 9, 3, 1, 5, 7, 8, 4, 6).reshape(WARPS, BN, q.shape[1] // ROWS * 64)
    t = gl.convert_layout(t, ones.type.layout, assert_trivial=True)  # only renames registers
    total = mma_v2(t, x, gl.zeros([WARPS, BN, BM], gl.float32, MMA))
    sums = mma_v2(ones, x, gl.zeros([WARPS, 16, BM], gl.float32, MMA)).reshape(WARPS, 1, 16, BM)
    sums = sums.broadcast_to((WARPS, ROWS, 16, BM)).reshape(WARPS, BN, BM)
    sums = gl.convert_layout(sums, MMA, assert_trivial=True)  # the same in all 16 rows
    raised = gl.expand_dims(raised_zero(zero, 4, DTYPE, True).to(gl.float32), 2) if ASYM else raise_of(4, DTYPE) + 8
    return (total - sums * raised) * gl.expand_dims(scale.to(gl.float32), 2)


@gluon.jit
def _store(acc, b_ptr, y_ptr, first_m, first_n, M, N, HAS_BIAS: gl.constexpr):
    """The sum over the warps of ``[warps, BN, BM]``, of which a thread reads all parts: one barrier."""
    WARPS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 4, 8], [1, WARPS, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, PARTS)
    parts = gl.allocate_shared_memory(gl.float32, acc.shape, gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    parts.store(acc)
    y = gl.sum(parts.load(PARTS), axis=0)
    n = first_n + gl.arange(0, acc.shape[1], gl.SliceLayout(1, OUT))
    m = first_m + gl.arange(0, acc.shape[2], gl.SliceLayout(0, OUT))
    if HAS_BIAS:
        y += gl.expand_dims(gl.load(b_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
    y_ptrs = y_ptr + m.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@gluon.jit(do_not_specialize=["M"])
def slim_kernel(
    x_ptr,  # [M, K] bfloat16 or float16
    w_ptr,  # uint8, 4 bits, see tiles.py
    b_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N], as x
    M,
    N,
    K,  # a multiple of BK
    GROUP: gl.constexpr,  # group size; 0: one group
    SCALES: gl.constexpr,  # dtype of the scales
    ASYM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,  # columns of a step of all warps
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,  # bytes of the weight to ask for before the kernel before has ended; 0: wait at once
):
    """Tile ``[BN, BM]`` of y.T; the program id is the tile, M fastest."""
    WARPS: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = BK // WARPS  # columns of a step of a warp, which share a scale
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PIECES: gl.constexpr = BN * WIDTH // 1024  # of 16 rows x 64 columns, of a warp in a step
    WORDS: gl.constexpr = _words_layout(PIECES, WARPS)
    gl.static_assert(GROUP % WIDTH == 0)
    gl.static_assert(BN <= 64)  # the rows of a program are in one row of tiles
    across = (M + BM - 1) // BM
    first_n, first_m = gl.program_id(0) // across * BN, gl.program_id(0) % across * BM
    steps = K // BK
    scale_ptr, zero_ptr = scales_of(w_ptr, N, K, 4, SCALES), zeros_of(w_ptr, N, K, 4, SCALES, GROUP)
    _begin(w_ptr, scale_ptr, zero_ptr, first_n, N, K, BN, GROUP, ASYM, AHEAD)
    x_ptrs, m = _x_pointers(x_ptr, first_m, K, BM, WIDTH)
    q_ptrs = _word_pointers(w_ptr, first_n, K, BN, WIDTH, WORDS)
    scale_ptrs, warp = _group_pointers(scale_ptr, first_n, BN)
    zero_ptrs, own = _group_pointers(zero_ptr, first_n, BN)
    width = padded(N)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, WARPS, BM, WIDTH], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
    qs = gl.allocate_shared_memory(gl.int32, [STAGES, WARPS, PIECES, 128], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    scales = gl.allocate_shared_memory(SCALES, [STAGES, WARPS, BN], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    zeros = scales
    if ASYM:
        zeros = gl.allocate_shared_memory(gl.uint8, [STAGES, WARPS, BN], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ring, sources = (qs, xs, scales, zeros), (q_ptrs, x_ptrs, scale_ptrs, zero_ptrs)
    for s in gl.static_range(STAGES - 1):  # steps beyond the last are the last one
        _fetch(ring, sources, (warp, own), m < M, s, gl.minimum(s, steps - 1), width, BK, GROUP, ASYM)
    ones = _ones(WIDTH, DTYPE, OPERAND)
    acc = gl.zeros([WARPS, BN, BM], gl.float32, MMA)
    for i in range(steps):
        async_copy.wait_group(STAGES - 2)
        q = qs.index(i % STAGES).load(WORDS)
        x = xs.index(i % STAGES).permute((0, 2, 1)).load(gl.DotOperandLayout(1, MMA, 2))
        scale = scales.index(i % STAGES).load(gl.SliceLayout(2, MMA))
        zero = scale
        if ASYM:
            zero = zeros.index(i % STAGES).load(gl.SliceLayout(2, MMA))
        slot, step = (i + STAGES - 1) % STAGES, gl.minimum(i + STAGES - 1, steps - 1)
        _fetch(ring, sources, (warp, own), m < M, slot, step, width, BK, GROUP, ASYM)
        acc += _product(q, x, scale, zero, ones, BN, ASYM, MMA)
    async_copy.wait_group(0)  # before the memory serves the sum
    _store(acc, b_ptr, y_ptr, first_m, first_n, M, N, HAS_BIAS)
