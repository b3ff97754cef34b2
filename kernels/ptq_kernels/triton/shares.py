"""Where a pipelined product goes: into y, or, split over K, into parts of which each program sums a share.

The programs of a split tile wait for each other, and then each sums the parts of some rows. So all programs of a launch
must be on the GPU at once: `configs.fits` sees to it that they can be, a cooperative launch that they are. The sums are
in one order; they have the same bits in every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and gluon.jit carries no annotations)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7 renamed it
# What a program adds to the counter of its tile when it has read the parts. When it has stored its own, it adds 1.
_LEAVING = gl.constexpr(65536)


@gluon.jit
def _store(acc, b_ptr, y_ptr, first_m, first_n, M, N, HAS_BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """A tile of y.T, with 16 bytes of a row of y a thread."""
    if HAS_BIAS:
        n = first_n + gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
        acc += gl.expand_dims(gl.load(b_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    n = first_n + gl.arange(0, BN, gl.SliceLayout(1, OUT))
    m = first_m + gl.arange(0, BM, gl.SliceLayout(0, OUT))
    y_ptrs = y_ptr + m.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(y_ptrs, gl.convert_layout(acc.to(y_ptr.dtype.element_ty), OUT), mask=(m < M)[None, :] & (n < N)[:, None])


@gluon.jit
def _store_part(acc, parts_ptr, counter_ptr, BM: gl.constexpr, BN: gl.constexpr):
    """Store the part ``[BM, BN]`` of this program, and wait until all programs of the tile have stored theirs."""
    n = gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
    m = gl.arange(0, BM, gl.SliceLayout(0, acc.type.layout))
    part = (gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)).to(gl.int64) * (BM * BN)
    gl.store(parts_ptr + part + (m[None, :] * BN + n[:, None]), acc)  # a whole tile: it needs no mask
    _barrier()  # the parts of all threads are written before the one atomic below publishes them
    arrived = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while arrived & (_LEAVING - 1) < gl.num_programs(1):
        arrived = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@gluon.jit
def _store_share(b_ptr, y_ptr, parts_ptr, counter_ptr, first_m, first_n, M, N, HAS_BIAS: gl.constexpr,
                 BM: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """Each program of a tile sums the parts of some of its rows of y, in the order of the parts, and stores them.

    Were the last one to come to sum the whole tile, it would read megabytes while all others have nothing to do.
    """
    ROWS: gl.constexpr = BM // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    splits = gl.num_programs(1)
    n = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = first_n + n
    bias = gl.zeros([BN], gl.float32, gl.SliceLayout(0, LAYOUT))
    if HAS_BIAS:
        bias = gl.load(b_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)
    for share in range(gl.program_id(1), 8, splits):
        m = share * ROWS + row
        inside = m[:, None] * BN + n[None, :]
        total = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
        # A load of a part is a trip to the L2 cache: four are under way at a time.
        for i in range(0, splits, 4):
            for j in gl.static_range(4):
                part = ((i + j) * gl.num_programs(0) + gl.program_id(0)).to(gl.int64) * (BM * BN)
                total += gl.load(
                    parts_ptr + part + inside, mask=inside * 0 + i + j < splits, other=0.0, cache_modifier=".cg"
                )
        rows = first_m + m
        y_ptrs = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        gl.store(y_ptrs, (total + bias[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
    _barrier()  # all threads have read the parts
    left = gl.atomic_add(counter_ptr, _LEAVING, sem="acq_rel", scope="gpu")
    if left // _LEAVING == splits - 1:
        gl.store(counter_ptr, 0)


@gluon.jit
def finish(acc, b_ptr, y_ptr, parts_ptr, counters_ptr, first_m, first_n, M, N, HAS_BIAS: gl.constexpr,
            SPLIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """Store a tile of y.T; of a split one a part, and then a share of the sum of all parts."""
    if SPLIT:
        counter_ptr = counters_ptr + gl.program_id(0)
        _store_part(acc, parts_ptr, counter_ptr, BM, BN)
        _store_share(b_ptr, y_ptr, parts_ptr, counter_ptr, first_m, first_n, M, N, HAS_BIAS, BM, BN)
    else:
        _store(acc, b_ptr, y_ptr, first_m, first_n, M, N, HAS_BIAS, BM, BN)
