"""Where things lie in a weight in fragment order (tiles.py), and loads of it, as parts of Triton kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# (Triton compiles what follows a return)

import triton
import triton.language as tl


@triton.jit
def padded(size):
    """N or K as the layout has it."""
    return (size + 127) // 128 * 128


@triton.jit
def scales_of(w_ptr, N, K, BITS: tl.constexpr, SCALES: tl.constexpr):
    """The scales behind the tiles, as a pointer to SCALES."""
    return (w_ptr + tl.cast(padded(N), tl.int64) * padded(K) * BITS // 8).to(tl.pointer_type(SCALES), bitcast=True)


@triton.jit
def zeros_of(w_ptr, N, K, BITS: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr):
    """The zeros behind the scales."""
    rows = tl.cast(padded(N), tl.int64)
    if GROUP:
        rows *= (padded(K) + GROUP - 1) // GROUP + 2
    scales = scales_of(w_ptr, N, K, BITS, SCALES) + rows
    return scales.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def tile_pointers(w_ptr, first_n, first_k, N, K, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Pointers ``[pieces, 512 * BITS or 2048]`` to rows first_n.. and columns first_k.., both in units of 64.

    A piece is a tile of 4 bits, or half a tile of 8 bits (or of 4 where BK is 32). The row varies fastest, as among
    the warps of a product. Rows beyond the padded N are those of the last tile.
    """
    PIECE: tl.constexpr = 32 if BITS == 8 or BK == 32 else 64  # columns
    A: tl.constexpr = BN // 64
    piece = tl.arange(0, A * BK // PIECE)
    across = piece // A
    down = first_n + piece % A
    if BN > 128:  # which N is padded to
        down = tl.minimum(down, padded(N) // 64 - 1)
    tile = down.to(tl.int64) * (padded(K) // 64) + first_k + across * PIECE // 64
    start = tile * (512 * BITS) + across % (64 // PIECE) * (8 * BITS * PIECE)
    return w_ptr + start[:, None] + tl.arange(0, 8 * BITS * PIECE)[None, :]


@triton.jit
def scale_pointers(w_ptr, n, first_k, N, K, BITS: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    """Pointers to the scales and the zeros of rows n and column first_k. Rows beyond the padded N are the last one."""
    if BN > 128:  # which N is padded to
        n = tl.minimum(n, padded(N) - 1)
    if GROUP:
        n += tl.cast(first_k // GROUP, tl.int64) * padded(N)
    return scales_of(w_ptr, N, K, BITS, SCALES) + n, zeros_of(w_ptr, N, K, BITS, SCALES, GROUP) + n


@triton.jit
def scale_and_zero(scale_ptrs, zero_ptrs, ASYM: tl.constexpr):
    """What lies there; without zeros the second one is the first and not used."""
    scale = tl.load(scale_ptrs)
    zero = scale
    if ASYM:
        zero = tl.load(zero_ptrs)
    return scale, zero


@triton.jit
def load_x(x_ptrs, k, in_m, K, EVEN_K: tl.constexpr, MASK_M: tl.constexpr):
    """Columns k of x.T, zero beyond its K, and, with MASK_M, where in_m is false."""
    if MASK_M and EVEN_K:
        x = tl.load(x_ptrs, mask=in_m[None, :], other=0.0, eviction_policy="evict_last")
    elif MASK_M:
        x = tl.load(x_ptrs, mask=in_m[None, :] & (k < K)[:, None], other=0.0, eviction_policy="evict_last")
    elif EVEN_K:
        x = tl.load(x_ptrs, eviction_policy="evict_last")
    else:
        x = tl.load(x_ptrs, mask=(k < K)[:, None], other=0.0, eviction_policy="evict_last")
    return x
