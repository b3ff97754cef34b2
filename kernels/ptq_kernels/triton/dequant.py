"""The dense weight from fragment-order tiles, a chunk of rows at a time, for products that cuBLAS does better.

A chunk is small enough to stay in the L2 cache of a large GPU between the kernel that writes it and the product that
reads it, so it costs no traffic to memory, and every chunk uses the same buffer.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)

import triton
import triton.language as tl

from ptq_kernels.triton.fragments import centered, raised_codes
from ptq_kernels.triton.pointers import scales_of, tile_pointers, zeros_of

BLOCK_N = 64
BLOCK_K = 128
NUM_WARPS = 4
CHUNK_BYTES = 32 * 2**20


@triton.jit(do_not_specialize=["first_row"])
def dequantize_kernel(
    w_ptr,  # uint8, see tiles.py
    out_ptr,  # [rows, K] bfloat16, float16 or float32
    first_row,  # of the chunk, a multiple of 128
    rows,
    N,
    K,
    BITS: tl.constexpr,
    ORDER: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    ASYM: tl.constexpr,
    SPAN: tl.constexpr,  # columns that share a scale, at most BK
    BN: tl.constexpr,
    BK: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Rows ``first_row..`` of the weight: formed in float32 and rounded once to the dtype of ``out``."""
    DTYPE: tl.constexpr = tl.bfloat16
    PARTS: tl.constexpr = BK // SPAN
    inner = tl.program_id(0) * BN
    first_k = tl.program_id(1) * BK
    q_ptrs = tile_pointers(w_ptr, (first_row + inner) // 64, first_k // 64, N, K, BITS, BN, BK)
    t = raised_codes(tl.load(q_ptrs), BITS, ORDER, BN, BK, DTYPE, USE_ASM)
    n = first_row + inner + tl.arange(0, BN)
    row = (first_k + tl.arange(0, PARTS) * SPAN).to(tl.int64)
    row = (row // GROUP if GROUP else row * 0) * ((N + 127) // 128 * 128)
    scale = tl.load(scales_of(w_ptr, N, K, BITS, SCALES) + row[None, :] + n[:, None]).to(tl.float32)
    zero = row
    if ASYM:
        zero = tl.load(zeros_of(w_ptr, N, K, BITS, SCALES, GROUP) + row[None, :] + n[:, None])
    t = centered(t.reshape(BN, PARTS, SPAN), zero, BITS, ASYM, DTYPE, USE_ASM).to(tl.float32)
    dense = (t * scale[:, :, None]).reshape(BN, BK).to(out_ptr.dtype.element_ty)
    local = inner + tl.arange(0, BN)
    k = first_k + tl.arange(0, BK)
    mask = (local < rows)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + local.to(tl.int64)[:, None] * K + k[None, :], dense, mask=mask)
