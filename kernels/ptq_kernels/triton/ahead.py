"""Programmatic dependent launch: a kernel begins while the one before it ends, and asks for its weight meanwhile.

From compute capability 9.0 on, a kernel launched so may start as soon as every program of the kernel before it on the
stream has said that it may, and has room. Until `griddepcontrol.wait` it must touch nothing that an earlier kernel may
write. Asking the L2 cache for the weight is no such access: the cache is where all multiprocessors agree on what memory
holds, and what it was asked for is read only after the wait.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# ruff: noqa: RET505
# (Triton compiles what follows a return)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ptq_kernels.triton.pointers import padded, scales_of, zeros_of

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
def ask_for_groups(base, at, first_n, first, count, width, BN: tl.constexpr):
    """Ask for so many rows ``[BN]`` of scales, or zeros, from a group and a weight row on; `at` is 0 to 127."""
    EACH: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth  # in a line
    ACROSS: tl.constexpr = (BN + EACH - 1) // EACH
    n = tl.minimum(first_n + at % ACROSS * EACH, width - 1)
    for start in range(0, count, _LINES // ACROSS):
        group = first + tl.minimum(start + at // ACROSS, count - 1)
        ask_for(base + (group * width + n))


@triton.jit
def groups_of(first, columns, GROUP: tl.constexpr):
    """The first group of so many columns, and how many there are."""
    if GROUP:
        return first // GROUP, (columns + GROUP - 1) // GROUP
    else:
        return 0, 1


@triton.jit
def ask(w_ptr, first_n, first_k, steps, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
        ASYM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Ask for the first AHEAD bytes of each row of tiles, and for scales and zeros. With AHEAD 0 nothing happens here.

    The weight of the program starts at row first_n and column first_k, both in units of 64, and has so many steps.
    """
    if AHEAD:
        down = tl.minimum(first_n + tl.arange(0, BN // 64), padded(N) // 64 - 1)
        row = w_ptr + (down.to(tl.int64) * (padded(K) // 64) + first_k)[:, None] * (512 * BITS)
        own = steps * (BK * 8 * BITS)
        last = tl.minimum(own, AHEAD) - _LINE
        for start in range(0, tl.minimum(own, AHEAD), _LINE * _LINES):
            ask_for(row + tl.minimum(start + tl.arange(0, _LINES) * _LINE, last)[None, :])
        first, count = groups_of(first_k * 64, steps * BK, GROUP)
        at = tl.arange(0, _LINES)
        ask_for_groups(scales_of(w_ptr, N, K, BITS, SCALES), at, first_n * 64, first, count, padded(N), BN)
        if ASYM:
            ask_for_groups(zeros_of(w_ptr, N, K, BITS, SCALES, GROUP), at, first_n * 64, first, count, padded(N), BN)


@triton.jit
def begin(w_ptr, first_n, first_k, steps, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
          ASYM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """As `ask`; then wait for the kernel before and let the next one begin, unless AHEAD is 0."""
    ask(w_ptr, first_n, first_k, steps, N, K, BITS, GROUP, SCALES, ASYM, BN, BK, AHEAD)
    if AHEAD:
        depend()
