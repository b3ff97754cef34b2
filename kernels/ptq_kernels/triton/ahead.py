"""Programmatic dependent launch: a kernel begins while the one before it ends, and asks for its weight meanwhile.

From compute capability 9.0 on, a kernel launched so may start as soon as every program of the kernel before it on the
stream has said that it may, and has room. Until `griddepcontrol.wait` it must touch nothing that an earlier kernel may
write. Asking the L2 cache for the weight is no such access: the cache is where all multiprocessors agree on what memory
holds, and what it was asked for is read only after the wait.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST_CAPABILITY = 90
BYTES = 32 * 1024  # what to ask for of each row of tiles of a program: half of the L2 cache of an H200 in all
_LINE = tl.constexpr(128)  # bytes that one prefetch brings
_LINES = tl.constexpr(128)  # of a row of tiles, in one instruction of all threads


@triton.jit
def ask_for(pointers):
    """Ask the L2 cache for the lines of 128 bytes at these addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def depend():
    """Wait for the kernel before, let the next one begin."""
    gdc_wait()
    # Only now: what comes next may rely on it that what came before this kernel has ended.
    gdc_launch_dependents()


@triton.jit
def begin(w_ptr, first_n, first_k, steps, N, K, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          AHEAD: tl.constexpr):  # fmt: skip
    """Ask for the first AHEAD bytes of each row of tiles, wait for the kernel before, let the next one begin.

    The weight of the program starts at row first_n and column first_k, both in units of 64, and has so many steps. With
    AHEAD 0 the kernel begins when the one before it has ended, and nothing happens here.
    """
    if AHEAD:
        down = tl.minimum(first_n + tl.arange(0, BN // 64), (N + 127) // 128 * 2 - 1)  # which N is padded to
        row = w_ptr + (down.to(tl.int64) * ((K + 127) // 128 * 2) + first_k)[:, None] * (512 * BITS)
        own = steps * (BK * 8 * BITS)
        last = tl.minimum(own, AHEAD) - _LINE
        for start in range(0, tl.minimum(own, AHEAD), _LINE * _LINES):
            ask_for(row + tl.minimum(start + tl.arange(0, _LINES) * _LINE, last)[None, :])
        depend()
