"""Where a pipelined product goes: into y, or, split over K, into shared memory, of which each program sums a share."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and gluon.jit carries no annotations)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ptq_kernels.triton.clusters import rows_together, store_sum

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7 renamed it


@gluon.constexpr_function
def _share_layout(columns, warps):
    """Of a share: 32 columns a warp, so that it stores 64 bytes of a row; warps beyond those take other rows."""
    across = min(warps, columns // 32)
    return gl.BlockedLayout([1, 1], [1, 32], [warps // across, across], [1, 0])


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
def finish(acc, full, b_ptr, y_ptr, rank, first_m, first_n, M, N, HAS_BIAS: gl.constexpr, SIZE: gl.constexpr,
            BM: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """Store a tile of y.T; of a split one a share of the sum of all parts. `full` are barriers no longer in use."""
    if SIZE > 1:
        _barrier()  # no warp waits at them any more
        STAGES: gl.constexpr = full.shape[0]
        for s in gl.static_range(STAGES):  # others may send to where they are
            mbarrier.invalidate(full.index(s))
        SHARE: gl.constexpr = _share_layout(BN, gl.num_warps())
        ROWS: gl.constexpr = BM // SIZE // rows_together(BM, SIZE)
        n = gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
        m = gl.arange(0, BM, gl.SliceLayout(0, acc.type.layout))
        share_n = gl.arange(0, BN, gl.SliceLayout(0, SHARE))
        share_m = gl.arange(0, ROWS, gl.SliceLayout(1, SHARE))
        thread = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        bias = gl.zeros([1, BN], gl.float32, SHARE)
        if HAS_BIAS:
            column = first_n + share_n
            bias += gl.load(b_ptr + column, mask=column < N, other=0.0).to(gl.float32)[None, :]
        store_sum(acc, bias, y_ptr, rank, first_m, first_n, n, m, share_n, share_m, thread, M, N, SIZE, True)
    else:
        _store(acc, b_ptr, y_ptr, first_m, first_n, M, N, HAS_BIAS, BM, BN)
