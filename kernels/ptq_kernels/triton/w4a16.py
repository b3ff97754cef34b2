"""One Triton kernel for canonical weights of 2, 3, 4 and 8 bits: unpack, multiply integers, scale the accumulator.

The codes minus their zeros are integers of at most 8 bits, exact in bfloat16 and float16. They go to the tensor cores
as they are, and the group's scale multiplies the float32 partial product. So no step of the loop may straddle two
groups: a group is cut into steps of BLOCK_K columns, the last one masked where BLOCK_K does not divide the group.

``acc += dot(...) * scale`` and never ``acc = dot(..., acc)``: Triton 3.6 lets the in-place form overwrite registers
that an asynchronous wgmma may still read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)

import contextlib
import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq_kernels.layouts import PackedWeight

BLOCK_N = 64
NUM_WARPS = 4
NUM_STAGES = 3
SMALL_ROWS = 16
_MOST_BLOCK_M = 32  # with 64 rows Hopper would take the asynchronous wgmma, see above; mma.sync is right everywhere


@triton.jit(do_not_specialize=["M"])
def w4a16_kernel(
    x_ptr,  # [M, K] bfloat16, float16 or float32
    q_ptr,  # int32 [N, words]
    s_ptr,  # bfloat16, float16 or float32 [N, groups]
    z_ptr,  # uint8 [N, groups]; not read unless HAS_ZEROS
    b_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N], as x
    M,
    N,
    K,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,  # the interpreter multiplies the bit patterns of bfloat16
):
    """One ``[BLOCK_M, BLOCK_N]`` tile of y. Program ids: the tile, M fastest (the second id ends at 65535)."""
    STEPS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(groups * STEPS):
        group = step // STEPS
        column = (step % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)  # within the group
        in_k = column < GROUP
        k = group * GROUP + column
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        bit = k * BITS
        shift = bit % 32
        q_ptrs = q_ptr + n[None, :] * words + (bit // 32)[:, None]
        in_w = in_k[:, None] & in_n[None, :]
        code = tl.load(q_ptrs, mask=in_w, other=0).to(tl.uint32, bitcast=True) >> shift[:, None].to(tl.uint32)
        if 32 % BITS != 0:  # 3 bits: a value may continue in the next word
            straddles = shift + BITS > 32
            high = tl.load(q_ptrs + 1, mask=in_w & straddles[:, None], other=0).to(tl.uint32, bitcast=True)
            code = code | (high << ((32 - shift) % 32)[:, None].to(tl.uint32))
        code = (code & (2**BITS - 1)).to(tl.int32)
        scale = tl.load(s_ptr + n * groups + group, mask=in_n, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            zero = tl.load(z_ptr + n * groups + group, mask=in_n, other=0).to(tl.int32)
            w = code - zero[None, :]
        else:
            w = code - 2 ** (BITS - 1)
        if FLOAT32_DOT:
            part = tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
        else:
            part = tl.dot(x, w.to(x.dtype), input_precision="ieee")
        acc += part * scale[None, :]
    if HAS_BIAS:
        acc += tl.load(b_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def block_k(group_size: int, dtype: torch.dtype) -> int:
    """Columns of a step: a power of two that divides the group where there is one, else one that wastes little.

    The limits keep every form free of register spills with Triton 3.6 to 3.9: 64 columns spill with 3.6, and float32
    rows go to the ordinary units, not to the tensor cores.
    """
    if dtype == torch.float32 or group_size <= 16 or group_size % 32 == 16:
        return 16
    return 32


def block_m(rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile: 16, the least the tensor cores take, or 32."""
    return SMALL_ROWS if rows <= SMALL_ROWS or dtype == torch.float32 else _MOST_BLOCK_M


# Triton decides when a kernel is defined, and so does this: a later change of the variable changes nothing.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreted() -> bool:
    """Whether Triton runs kernels in its Python interpreter, on CPU tensors."""
    return _INTERPRETED


def refuse(device: torch.device) -> str | None:
    """Why no Triton kernel of this package can run on `device`; None: they can."""
    if device.type == "cuda":
        return _too_old(device)
    if interpreted() and device.type == "cpu":
        return None
    return f"the Triton kernels need CUDA tensors, got {device}"


@cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"the Triton kernels need compute capability 8.0 or newer, {device} has {major}.{minor}"


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias`` for a canonical weight; ``[M, N]`` in ``x.dtype``."""
    rows, columns = x.shape
    y = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
    tile = block_m(rows, x.dtype)
    grid = (triton.cdiv(weight.out_features, BLOCK_N) * triton.cdiv(rows, tile),)
    qweight, scales = weight.qweight.contiguous(), weight.scales.contiguous()
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        w4a16_kernel[grid](
            x,
            qweight,
            scales,
            zeros if zeros is not None else qweight,
            bias.contiguous() if bias is not None else x,
            y,
            rows,
            weight.out_features,
            columns,
            qweight.shape[1],
            scales.shape[1],
            BITS=weight.bits,
            GROUP=weight.group_size,
            BLOCK_M=tile,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block_k(weight.group_size, x.dtype),
            HAS_ZEROS=zeros is not None,
            HAS_BIAS=bias is not None,
            FLOAT32_DOT=interpreted(),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            enable_fp_fusion=True,  # the accumulator's multiply-add; Triton 3.10 no longer fuses unasked
        )
    return y
