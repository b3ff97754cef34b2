"""Unpacking of fragment-order tiles (tiles.py) into the operand of a tensor-core product, as parts of Triton kernels.

A 4-bit code becomes a float without a conversion instruction: put under the mantissa of a power of two whose last bits
count in ones, it reads 128 + code in bfloat16. In float16, four bits further up, it reads 64 + code: raised tiles
(tiled.py) multiply with what it reads, and tensor cores cut what they add to a sum off at the sum's own last bits. An
8-bit code reads 1024 + code in float16; bfloat16 has too few bits for it and takes the detour over float32. What the
code was raised by is subtracted together with the zero: small integers, exact.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)
# ruff: noqa: RET505, SIM300
# (Triton compiles what follows a return, and compares a constexpr by its own method)

import triton
import triton.language as tl


@triton.constexpr_function
def raise_of(bits, dtype):
    """What is added to a code."""
    if dtype == tl.bfloat16:
        return 128.0 if bits == 4 else -128.0
    return 64.0 if bits == 4 else 1024.0


@triton.jit
def _codes4_bf16(q):
    """uint8 -> two bfloat16 tensors of its shape, 128 + code; lop3 0xEA is ``(a & b) | c``."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c;
        shr.u32 a, $4, 4;
        shr.u32 b, $4, 8;
        shr.u32 c, $4, 12;
        lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $2, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $3, c, 0x000F000F, 0x43004300, 0xEA;
        }""",
        "=r,=r,=r,=r,r",
        [q],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _codes4_fp16(q):
    """uint8 -> two float16 tensors of its shape, 64 + code. The word is read last where the first is written."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c;
        shl.b32 a, $4, 4;
        shr.u32 b, $4, 4;
        shr.u32 c, $4, 8;
        lop3.b32 $1, $4, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $0, a, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $2, b, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $3, c, 0x00F000F0, 0x54005400, 0xEA;
        }""",
        "=r,=r,=r,=r,r",
        [q],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _codes8_bf16(q):
    """uint8 -> bfloat16, code - 128: each byte under the mantissa of 2**23 in float32, then exactly rounded pairs."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        .reg .f32 e, f, g, h;
        prmt.b32 a, $2, 0x4B000000, 0x7440;
        prmt.b32 b, $2, 0x4B000000, 0x7441;
        prmt.b32 c, $2, 0x4B000000, 0x7442;
        prmt.b32 d, $2, 0x4B000000, 0x7443;
        add.f32 e, a, 0fCB000080;
        add.f32 f, b, 0fCB000080;
        add.f32 g, c, 0fCB000080;
        add.f32 h, d, 0fCB000080;
        cvt.rn.bf16x2.f32 $0, f, e;
        cvt.rn.bf16x2.f32 $1, h, g;
        }""",
        "=r,=r,r",
        [q],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _codes8_fp16(q):
    """uint8 -> float16, 1024 + code."""
    return tl.inline_asm_elementwise(
        """{
        prmt.b32 $0, $2, 0x64646464, 0x4140;
        prmt.b32 $1, $2, 0x64646464, 0x4342;
        }""",
        "=&r,=&r,r",
        [q],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _codes4_plain(q, TILES: tl.constexpr, H: tl.constexpr):
    """What the assembly of 4 bits computes, in float32 and not raised: byte b of a word stands for fields
    2 (b // 2) and, in the second result, 8 bits further, of the half word b % 2.
    """
    b = tl.arange(0, 4)
    word = tl.sum(q.reshape(TILES, 256 * H, 4).to(tl.int32) << (b * 8)[None, None, :], axis=2)
    shift = (b % 2) * 16 + (b // 2) * 4
    first = ((word[:, :, None] >> shift[None, None, :]) & 15).to(tl.float32)
    second = ((word[:, :, None] >> (shift + 8)[None, None, :]) & 15).to(tl.float32)
    return first.reshape(TILES, 1024 * H), second.reshape(TILES, 1024 * H)


@triton.jit
def raised_codes(q, BITS: tl.constexpr, ORDER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
                 USE_ASM: tl.constexpr):  # fmt: skip
    """What lies at `tile_pointers` -> raised codes ``[BN, BK]`` in DTYPE. The shapes only rename registers."""
    RAISED: tl.constexpr = raise_of(BITS, DTYPE)
    A: tl.constexpr = BN // 64
    B: tl.constexpr = (BK + 63) // 64
    H: tl.constexpr = BK // B // 32  # halves of a tile: 2, or 1 where BK is 32
    if BITS == 4:
        if not USE_ASM:
            first, second = _codes4_plain(q, A * B, H)
            t = tl.join(first, second) + RAISED
        elif DTYPE == tl.bfloat16:
            first, second = _codes4_bf16(q)
            t = tl.join(first, second)
        else:
            first, second = _codes4_fp16(q)
            t = tl.join(first, second)
        if ORDER == 90:  # B A | w lh ll j rh kk | r -> A w rh lh, B j r ll kk
            t = t.reshape(B, A, 4, 8, 4, 2 * H, 2, 2, 2).permute(1, 2, 6, 3, 0, 5, 8, 4, 7)
        else:  # B A | w lh ll jt jr eh kk | r -> A w jr lh, B jt ll r eh kk
            t = t.reshape(B, A, 4, 8, 4, H, 2, 2, 2, 2).permute(1, 2, 6, 3, 0, 5, 4, 9, 7, 8)
    else:
        if not USE_ASM:
            t = q.to(tl.float32) + RAISED
        elif DTYPE == tl.bfloat16:
            t = _codes8_bf16(q)
        else:
            t = _codes8_fp16(q)
        if ORDER == 90:  # B h A | w lh ll j r rh kk -> A w rh lh, B h j r ll kk
            t = t.reshape(B * H, A, 4, 8, 4, 2, 2, 2, 2).permute(1, 2, 7, 3, 0, 5, 6, 4, 8)
        else:  # B jt A | w lh ll jr r eh kk -> A w jr lh, B jt ll r eh kk
            t = t.reshape(B * H, A, 4, 8, 4, 2, 2, 2, 2).permute(1, 2, 5, 3, 0, 4, 6, 7, 8)
    return t.reshape(BN, BK)


@triton.jit
def _words4_bf16(q):
    """int32 -> eight bfloat16 tensors of its shape, 128 + code: element e of output 4 w + i is field i, of the half
    words e, of word w of a pair."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c;
        shr.u32 a, $8, 4;
        shr.u32 b, $8, 8;
        shr.u32 c, $8, 12;
        lop3.b32 $0, $8, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $2, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $3, c, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 a, $9, 4;
        shr.u32 b, $9, 8;
        shr.u32 c, $9, 12;
        lop3.b32 $4, $9, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $5, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $6, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $7, c, 0x000F000F, 0x43004300, 0xEA;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [q],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _words4_fp16(q):
    """int32 -> eight float16 tensors of its shape, 64 + code: element e of output 4 w + i is field i, of the half
    words e, of word w of a pair."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c;
        shl.b32 a, $8, 4;
        shr.u32 b, $8, 4;
        shr.u32 c, $8, 8;
        lop3.b32 $0, a, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $1, $8, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $2, b, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $3, c, 0x00F000F0, 0x54005400, 0xEA;
        shl.b32 a, $9, 4;
        shr.u32 b, $9, 4;
        shr.u32 c, $9, 8;
        lop3.b32 $4, a, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $5, $9, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $6, b, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 $7, c, 0x00F000F0, 0x54005400, 0xEA;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [q],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def codes4_of_words(q, DTYPE: tl.constexpr):
    """int32 ``[..., 2]`` -> raised codes ``[..., 2, 2, 2, 2]``: half word, word, and a field's two bits, low one last.

    Each word is one register of four that hold two codes: a pair of words is unpacked at a time.
    """
    if DTYPE == tl.bfloat16:
        a, b, c, d, e, f, g, h = _words4_bf16(q)
    else:
        a, b, c, d, e, f, g, h = _words4_fp16(q)
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit
def half_tiles(q, TILES: tl.constexpr):
    """4-bit tiles ``[TILES, 2048]`` -> those of columns 0..31 and of columns 32..63, ``[TILES, 1024]`` each."""
    first, second = tl.split(q.reshape(TILES, 128, 2, 8).permute(0, 1, 3, 2))
    return first.reshape(TILES, 1024), second.reshape(TILES, 1024)


@triton.jit
def raised_zero(zero, BITS: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """uint8 zeros -> DTYPE, raised as the codes are; by or, so that no integer is converted."""
    RAISED: tl.constexpr = raise_of(BITS, DTYPE)
    if not USE_ASM:
        return zero.to(tl.float32) + RAISED
    elif DTYPE != tl.bfloat16 and BITS == 4:
        return ((zero.to(tl.uint16) << 4) | 0x5400).to(tl.float16, bitcast=True)
    elif DTYPE != tl.bfloat16:
        return (zero.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif BITS == 4:
        return (zero.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return ((zero.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(tl.bfloat16)


@triton.jit
def centered(t, zero, BITS: tl.constexpr, ASYM: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """Raised codes ``[..., columns]`` minus their uint8 zeros ``[...]``, or minus the middle of the range."""
    MIDDLE: tl.constexpr = raise_of(BITS, DTYPE) + 2 ** (BITS - 1)
    if ASYM:
        return t - tl.expand_dims(raised_zero(zero, BITS, DTYPE, USE_ASM), -1)
    elif MIDDLE == 0:
        return t
    else:
        return t - MIDDLE
