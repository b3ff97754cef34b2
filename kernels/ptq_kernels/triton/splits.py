"""Products split over K: which steps a program takes, and how the parts become one, as parts of Triton kernels.

Each of the programs of an output tile writes its float32 part to a workspace; the last one to arrive, known by a
counter, adds the parts in their order. The result has the same bits in every run, whoever comes last. Or the programs
are a cluster (clusters.py), which needs neither workspace nor counter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# (Triton compiles what follows a return)

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

from ptq_kernels.triton import clusters


@triton.jit
def own_tile(M, BM: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr):
    """(which tile of weight rows, rows of x, weight rows) of this program; of a cluster of SIZE, one tile; the next
    tiles are those of x.
    """
    rows = tl.cdiv(M, BM)
    tile = tl.program_id(0) // SIZE
    pn = tile // rows
    return pn, tile % rows * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)


@triton.jit
def own_steps(K, BK: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """(first step, number of steps) of this program."""
    if SIZE > 1:
        return clusters.own_steps(K, BK, SIZE)
    first = 0
    count = tl.cdiv(K, BK)
    if SPLIT:
        each = tl.cdiv(count, tl.num_programs(1))
        first = tl.program_id(1) * each
        count = tl.minimum(each, count - first)
    return first, count


@triton.jit
def _store_share(acc, b_ptr, y_ptr, M, N, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    """Store this program's share of the sum of the parts of its cluster."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    rows = tl.cdiv(M, BM)
    tile = tl.program_id(0) // SIZE
    first_m, first_n = tile % rows * BM, tile // rows * BN
    share_n = tl.arange(0, BN)
    share_m = tl.arange(0, BM // SIZE // clusters.rows_together(BM, SIZE))
    thread = tl.arange(0, num_threads())
    bias = tl.zeros((1, BN), tl.float32)
    if HAS_BIAS:
        bias += clusters.load_in_place(b_ptr + tl.minimum(first_n + share_n, N - 1)).to(tl.float32)[None, :]
    clusters.store_sum(acc, bias, y_ptr, tl.program_id(0) % SIZE, first_m, first_n, tl.arange(0, BN),
                       tl.arange(0, BM), share_n, share_m, thread, M, N, SIZE, False)  # fmt: skip


@triton.jit
def store(
    acc, b_ptr, y_ptr, parts_ptr, counters_ptr, m, n, M, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    SIZE: tl.constexpr
):  # fmt: skip
    """Store a tile of y.T; of a split one, store the part, and the last to arrive stores the sum of all parts."""
    if SIZE > 1:
        _store_share(acc, b_ptr, y_ptr, M, N, HAS_BIAS, SIZE)
    else:
        _store(acc, b_ptr, y_ptr, parts_ptr, counters_ptr, m, n, M, N, HAS_BIAS, SPLIT)


@triton.jit
def _store(
    acc, b_ptr, y_ptr, parts_ptr, counters_ptr, m, n, M, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    TOGETHER: tl.constexpr = 64 // acc.shape[1] if acc.shape[1] < 64 else 1  # parts whose loads wait for each other
    mask = (m < M)[None, :] & (n < N)[:, None]
    last = True
    if SPLIT:
        splits = tl.num_programs(1)
        size = M * N  # the workspace holds fewer than 2**31 values
        offset = m[None, :] * N + n[:, None]
        tl.store(parts_ptr + (tl.program_id(1) * size + offset), acc, mask=mask)
        tl.debug_barrier()  # the parts of all threads are written before the one atomic below publishes them
        arrived = tl.atomic_add(counters_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        last = arrived == splits - 1
        if last:
            acc = tl.zeros_like(acc)
            none = tl.zeros_like(offset)  # a mask of a scalar alone is one of integers in Triton 3.9's interpreter
            # A load of a part is a trip to the L2 cache: several are under way at a time, as many as registers hold.
            for i in range(0, splits, TOGETHER):
                for j in tl.static_range(TOGETHER):
                    part = parts_ptr + ((i + j) * size + offset)
                    acc += tl.load(part, mask=mask & (i + j + none < splits), other=0.0, cache_modifier=".cg")
            tl.store(counters_ptr + tl.program_id(0), 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        y_ptrs = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)
