"""The sum of a product split over K, in shared memory: the programs of an output tile are a cluster of Hopper's.

Each puts its float32 part into its own shared memory; when all have, each sums a share of the rows of y out of the
memories of all. Nothing goes through global memory, nobody waits for a counter in it, and the hardware begins the
programs of a cluster together. The sums are in the order of the parts: the same bits in every run.

Triton does not know of the parts' memory, which is all that the kernel has, from its beginning: whatever lay there must
no longer be needed, and the launch must see to its size and to the cluster (`join`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# ruff: noqa: RET505
# (Triton compiles what follows a return)

from typing import Any

import triton
import triton.language as tl

_USUAL_BYTES = 48 * 1024  # of shared memory, which a kernel has unasked
_PAD = tl.constexpr(8)  # values after a row of a part: the rows of a matrix of tensor cores begin in different banks


def bytes_needed(block_m: int, block_n: int) -> int:
    """Of shared memory, for a part."""
    return 4 * block_n * (block_m + int(_PAD.value))


def join(kernel: Any, size: int, least_bytes: int) -> None:
    """Make every launch of a compiled kernel one of clusters of `size` programs with so many bytes of shared memory.

    For Triton it is a kernel whose programs have nothing to do with each other; a grid counts clusters from now on.
    Raises RuntimeError where Triton does not hand these figures to its launcher as those known do, or where it has not
    asked the driver for more than the usual memory and the kernel now needs it.
    """
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    joined = (warps, size, max(shared, least_bytes))
    if kernel.packed_metadata not in ((warps, 1, shared), joined):
        raise RuntimeError(
            "a product split into a cluster must be launched with (warps, programs of a cluster, bytes of shared "
            f"memory), this Triton has {kernel.packed_metadata}; take Triton 3.6 to 3.9"
        )
    if shared <= _USUAL_BYTES < least_bytes:
        raise RuntimeError(
            f"a kernel whose part takes {least_bytes} bytes of shared memory must have over {_USUAL_BYTES} of its own, "
            f"it has {shared}; take a tile with more stages"
        )
    if kernel.packed_metadata != joined:
        kernel.packed_metadata = joined


@triton.jit
def own_steps(K, BK: tl.constexpr, SIZE: tl.constexpr):
    """(first step, number of steps) of this program, whose cluster has as many as the parts of K."""
    steps = (K + BK - 1) // BK
    rank = tl.program_id(0) % SIZE
    first = rank * steps // SIZE
    return first, (rank + 1) * steps // SIZE - first


@triton.jit
def _arrive(thread):
    """Say, once a thread, that the parts may be read, or were read."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; mov.b32 $0, 0;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _wait(thread):
    """Wait until all threads of the cluster have said so."""
    tl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _put(at, value, PAIRS: tl.constexpr):
    """Store values so many bytes into shared memory; pairs where they are known to lie side by side."""
    if PAIRS:
        tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $2; st.shared.v2.f32 [a], {$4, $5}; "
            "mov.b32 $0, 0; mov.b32 $1, 0; }",
            "=r,=r,r,r,f,f", [at, value], tl.int32, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $1; st.shared.f32 [a], $2; mov.b32 $0, 0; }",
            "=r,r,f", [at, value], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _get(at, rank, FOUR: tl.constexpr):
    """Two or four values, so many bytes into the shared memory of a program of the cluster."""
    if FOUR:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $4; mapa.shared::cluster.u32 a, a, $5; "
            "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [a]; }",
            "=f,=f,=f,=f,r,r", [at, rank], (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $2; mapa.shared::cluster.u32 a, a, $3; "
            "ld.shared::cluster.v2.f32 {$0, $1}, [a]; }",
            "=f,=f,r,r", [at, rank], (tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _store_row(total, bias, y_ptr, row, column, M, N):
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(y_ptrs, (total + bias).to(y_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def store_sum(acc, bias, y_ptr, rank, first_m, first_n, n, m, share_n, share_m, thread, M, N, SIZE: tl.constexpr,
              EXPLICIT: tl.constexpr):  # fmt: skip
    """Store this program's share of the rows of a tile of y, of which acc ``[BN, BM]`` is a part of y.T.

    n and m number the rows and columns of acc; share_n the BN columns of the share, share_m its rows by two, or by
    four where it has so many; thread has an element a thread; bias is float32 ``[1, BN]``, by the columns of the share.
    EXPLICIT says that the layouts are a caller's own choice, in Gluon: acc has two columns side by side in a thread, as
    tensor cores leave them, and no value moves to another thread, which would take shared memory, on its way to y.
    """
    BM: tl.constexpr = acc.shape[1]
    ROWS: tl.constexpr = BM // SIZE
    FOUR: tl.constexpr = ROWS % 4 == 0
    STEP: tl.constexpr = 4 if FOUR else 2
    STRIDE: tl.constexpr = 4 * (BM + _PAD)
    tl.debug_barrier()  # no warp needs what lay there
    _put(n[:, None] * STRIDE + m[None, :] * 4, acc, EXPLICIT)
    _arrive(thread)
    _wait(thread)
    at = share_n[None, :] * STRIDE + (rank * ROWS + share_m[:, None] * STEP) * 4
    row = first_m + rank * ROWS + share_m * STEP
    column = first_n + share_n
    if FOUR:
        a, b, c, d = _get(at, at * 0, True)
        for other in tl.static_range(1, SIZE):
            a1, b1, c1, d1 = _get(at, at * 0 + other, True)
            a, b, c, d = a + a1, b + b1, c + c1, d + d1
        _arrive(thread)
        if not EXPLICIT:
            _wait(thread)
        _store_row(a, bias, y_ptr, row, column, M, N)
        _store_row(b, bias, y_ptr, row + 1, column, M, N)
        _store_row(c, bias, y_ptr, row + 2, column, M, N)
        _store_row(d, bias, y_ptr, row + 3, column, M, N)
    else:
        a, b = _get(at, at * 0, False)
        for other in tl.static_range(1, SIZE):
            a1, b1 = _get(at, at * 0 + other, False)
            a, b = a + a1, b + b1
        _arrive(thread)
        if not EXPLICIT:
            _wait(thread)
        _store_row(a, bias, y_ptr, row, column, M, N)
        _store_row(b, bias, y_ptr, row + 1, column, M, N)
    if EXPLICIT:
        _wait(thread)  # others may still read the part of this program
