"""The sum of a product split over K, in shared memory: the programs of an output tile are a cluster of Hopper's.

Each has a share of the rows of y. It sends what it has of the others' shares, in float32, into their shared memory, by
stores that a barrier there counts, and sums its own when all of it has come. Nothing goes through global memory, nobody
waits for a counter in it, no fence waits for all stores of a thread, and the hardware begins the programs of a cluster
together. The sums are in the order of the parts: the same bits in every run.

Triton does not know of what is received, which lies in the memory that the kernel has, from its beginning: whatever lay
there must no longer be needed, and the launch must see to its size and to the cluster (`join`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# ruff: noqa: RET505
# (Triton compiles what follows a return)

from typing import Any

import triton
import triton.language as tl

_USUAL_BYTES = 48 * 1024  # of shared memory, which a kernel has unasked
_HEAD = tl.constexpr(16)  # bytes before what is received: its barrier


def bytes_needed(block_m: int, block_n: int) -> int:
    """Of shared memory, for a tile's parts of a share, which are as large as a tile, and their barrier."""
    return 4 * block_n * block_m + int(_HEAD.value)


def has_room(shared: int, block_m: int, block_n: int) -> bool:
    """Whether a kernel with so much shared memory of its own may receive what it must.

    Triton asks the driver for more than 48 KiB where it needs that itself.
    """
    return bytes_needed(block_m, block_n) <= _USUAL_BYTES or shared > _USUAL_BYTES


def join(kernel: Any, size: int, block_m: int, block_n: int) -> None:
    """Make every launch of a compiled kernel one of clusters of `size` programs that sum tiles of that size.

    For Triton it is a kernel whose programs have nothing to do with each other; a grid counts clusters from now on.
    Raises RuntimeError where Triton does not hand these figures to its launcher as those known do, where it has not
    asked the driver for more than the usual memory and the kernel now needs it, and where the kernel has scratch
    memory, which Triton would make for as many programs as it knows of.
    """
    least_bytes = bytes_needed(block_m, block_n)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    joined = (warps, size, max(shared, least_bytes))
    if kernel.packed_metadata not in ((warps, 1, shared), joined):
        raise RuntimeError(
            "a product split into a cluster must be launched with (warps, programs of a cluster, bytes of shared "
            f"memory), this Triton has {kernel.packed_metadata}; take Triton 3.6 to 3.9"
        )
    scratch = {name: getattr(kernel.metadata, name, 0) for name in ("global_scratch_size", "profile_scratch_size")}
    if any(scratch.values()):
        raise RuntimeError(
            f"a kernel of clusters must have no scratch memory, it has {scratch}; do without profiling it"
        )
    if not has_room(shared, block_m, block_n):
        raise RuntimeError(
            f"a kernel that receives {least_bytes} bytes of shared memory must have over {_USUAL_BYTES} of its own, "
            f"it has {shared}; take a tile with more stages"
        )
    if kernel.packed_metadata != joined:
        kernel.packed_metadata = joined


@triton.constexpr_function
def rows_together(block_m: int, size: int) -> int:
    """How many rows of a share one load brings: four where it has so many, or two."""
    return 4 if block_m // size % 4 == 0 else 2


@triton.jit
def own_steps(K, BK: tl.constexpr, SIZE: tl.constexpr):
    """(first step, number of steps) of this program, whose cluster has as many as the parts of K."""
    steps = (K + BK - 1) // BK
    rank = tl.program_id(0) % SIZE
    first = rank * steps // SIZE
    return first, (rank + 1) * steps // SIZE - first


@triton.jit
def _open(thread, size):
    """Thread 0 makes the barrier that says when so many bytes have come, at the beginning of shared memory."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, global_smem; setp.eq.u32 p, $1, 0; "
        "@p mbarrier.init.shared::cta.b64 [a], 1; @p fence.mbarrier_init.release.cluster; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [a], $2; mov.b32 $0, 0; }",
        "=r,r,r", [thread, size], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _meet(thread):
    """Wait until all threads of the cluster are here, and done with the shared memory that others send to.

    The fence is for that memory alone; one for all memory, which an arrival is unless relaxed, waits for every store.
    """
    tl.inline_asm_elementwise(
        "fence.release.sync_restrict::shared::cta.cluster; barrier.cluster.arrive.relaxed.aligned; "
        "barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;",
        "=r,r", [thread], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _send(at, rank, value, PAIRS: tl.constexpr):
    """Send values so many bytes into the shared memory of programs of the cluster; pairs that lie side by side."""
    if PAIRS:
        tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; mov.b32 b, global_smem; add.u32 a, b, $2; mapa.shared::cluster.u32 a, a, $4; "
            "mapa.shared::cluster.u32 b, b, $4; "
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {$6, $7}, [b]; "
            "mov.b32 $0, 0; mov.b32 $1, 0; }",
            "=r,=r,r,r,r,r,f,f", [at, rank, value], tl.int32, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; mov.b32 b, global_smem; add.u32 a, b, $1; mapa.shared::cluster.u32 a, a, $2; "
            "mapa.shared::cluster.u32 b, b, $2; "
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [a], $3, [b]; mov.b32 $0, 0; }",
            "=r,r,r,f", [at, rank, value], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _receive(thread):
    """Wait until all bytes have come."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, global_smem; "
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [a], 0; @!p bra.uni again; "
        "mov.b32 $0, 0; }",
        "=r,r", [thread], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _close(thread):
    """Give the memory back to Triton, once all warps have what they need of it."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, global_smem; setp.eq.u32 p, $1, 0; "
        "@p mbarrier.inval.shared::cta.b64 [a]; mov.b32 $0, 0; }",
        "=r,r", [thread], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _get(at, FOUR: tl.constexpr):
    """Two or four values, so many bytes into shared memory."""
    if FOUR:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $4; ld.shared.v4.f32 {$0, $1, $2, $3}, [a]; }",
            "=f,=f,=f,=f,r", [at], (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $2; ld.shared.v2.f32 {$0, $1}, [a]; }",
            "=f,=f,r", [at], (tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_in_place(pointers):
    """Load values of 16 or 32 bits into the threads that have the pointers.

    Triton has other threads load them if that takes fewer instructions, and may move the values, through shared memory,
    at any time until they are used: when that memory is for what others send.
    """
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16:
        bits = tl.inline_asm_elementwise(
            "ld.global.b16 $0, [$1];", "=h,l", [pointers.to(tl.int64)], tl.int16, is_pure=False, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _store_row(total, bias, y_ptr, row, column, M, N):
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(y_ptrs, (total + bias).to(y_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def store_sum(acc, bias, y_ptr, rank, first_m, first_n, n, m, share_n, share_m, thread, M, N, SIZE: tl.constexpr,
              EXPLICIT: tl.constexpr):  # fmt: skip
    """Store this program's share of the rows of a tile of y, of which acc ``[BN, BM]`` is a part of y.T.

    n and m number the rows and columns of acc; share_n the BN columns of the share, share_m its rows, some together
    (`rows_together`); thread has an element a thread; bias is float32 ``[1, BN]``, by the columns of the share.
    EXPLICIT says that layouts are the caller's, in Gluon: acc has two columns side by side in a thread, as tensor cores
    leave them, and no value goes to another thread on its way to y, which would take shared memory.
    """
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    ROWS: tl.constexpr = BM // SIZE
    STEP: tl.constexpr = rows_together(BM, SIZE)
    FOUR: tl.constexpr = STEP == 4
    tl.debug_barrier()  # no warp needs what lay there
    _open(thread, thread * 0 + 4 * BN * BM)
    _meet(thread)  # nor one of another program, which has its barrier
    row = (rank * BN + n[:, None]) * ROWS + (m % ROWS)[None, :]
    _send(row * 4 + _HEAD, row * 0 + (m // ROWS)[None, :], acc, EXPLICIT)
    at = (share_n[None, :] * ROWS + share_m[:, None] * STEP) * 4 + _HEAD
    row = first_m + rank * ROWS + share_m * STEP
    column = first_n + share_n
    _receive(thread)
    if FOUR:
        a, b, c, d = _get(at, True)
        for other in tl.static_range(1, SIZE):
            a1, b1, c1, d1 = _get(at + 4 * other * BN * ROWS, True)
            a, b, c, d = a + a1, b + b1, c + c1, d + d1
        if not EXPLICIT:
            _close(thread)
        _store_row(a, bias, y_ptr, row, column, M, N)
        _store_row(b, bias, y_ptr, row + 1, column, M, N)
        _store_row(c, bias, y_ptr, row + 2, column, M, N)
        _store_row(d, bias, y_ptr, row + 3, column, M, N)
    else:
        a, b = _get(at, False)
        for other in tl.static_range(1, SIZE):
            a1, b1 = _get(at + 4 * other * BN * ROWS, False)
            a, b = a + a1, b + b1
        if not EXPLICIT:
            _close(thread)
        _store_row(a, bias, y_ptr, row, column, M, N)
        _store_row(b, bias, y_ptr, row + 1, column, M, N)
