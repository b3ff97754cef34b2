"""The emulated machine, instruction by instruction.

Oracles: integers of Python for integer instructions, fractions rounded once for floats, torch, and loops over the
tables of the PTX manual for what lies in fragments and in swizzled shared memory.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import ptx_machine
import pytest
import torch
from ptx_snippets import COPY, evaluate, run, wait


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def s(value: int) -> int:
    return signed(value, 32)


def bfe(value: int, start: int, length: int, bits: int, keeps_sign: bool) -> int:
    """The pseudo code of the manual."""
    start, length = start & 255, length & 255
    last = min(start + length - 1, bits - 1)
    sign = value >> last & 1 if keeps_sign and length else 0
    return sum(
        ((value >> (start + i) & 1) if i < length and start + i < bits else sign) << i for i in range(bits)
    ) & (2**bits - 1)  # fmt: skip


def prmt(a: int, b: int, selector: int) -> int:
    pool = (b << 32 | a).to_bytes(8, "little")
    chosen = [(pool[selector >> 4 * i & 7], selector >> (4 * i + 3) & 1) for i in range(4)]
    return int.from_bytes(bytes((255 * (byte >> 7)) if sign else byte for byte, sign in chosen), "little")


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


U, W, H = np.uint32, np.uint64, np.uint16
INTEGERS: dict[str, tuple[tuple[Any, ...], Any, Callable[..., int]]] = {
    "add.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: a + b),
    "sub.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: a - b),
    "add.s64 %y, %x0, 4611686293305294850;": ((W,), W, lambda a: a + 4611686293305294850),
    "mul.lo.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: a * b),
    "mul.hi.u32 %y, %x0, -1431655765;": ((U,), U, lambda a: a * (-1431655765 % 2**32) >> 32),
    "mul.hi.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: s(a) * s(b) >> 32),
    "mul.wide.s32 %y, %x0, %x1;": ((U, U), W, lambda a, b: s(a) * s(b)),
    "mad.lo.s32 %y, %x0, -16376, %x1;": ((U, U), U, lambda a, b: a * -16376 + b),
    "mad.wide.s32 %y, %x0, 2, %x1;": ((U, W), W, lambda a, b: s(a) * 2 + b),
    "mad.wide.u32 %y, %x0, %x1, %x2;": ((U, U, W), W, lambda a, b, c: a * b + c),
    "div.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: truncated(s(a), s(b))),
    "rem.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: s(a) - truncated(s(a), s(b)) * s(b)),
    "neg.s64 %y, %x0;": ((W,), W, lambda a: -a),
    "min.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: min(s(a), s(b))),
    "max.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: max(s(a), s(b))),
    "shl.b32 %y, %x0, %x1;": ((U, U), U, lambda a, b: a << b if b < 32 else 0),
    "shl.b64 %y, %x0, %x1;": ((W, U), W, lambda a, b: a << b if b < 64 else 0),
    "shr.u32 %y, %x0, %x1;": ((U, U), U, lambda a, b: a >> b if b < 32 else 0),
    "shr.s32 %y, %x0, %x1;": ((U, U), U, lambda a, b: s(a) >> min(b, 31)),
    "bfe.u32 %y, %x0, %x1, %x2;": ((U, U, U), U, lambda a, b, c: bfe(a, b, c, 32, False)),
    "bfe.u32 %y, %x0, 4, 14;": ((U,), U, lambda a: a >> 4 & 0x3FFF),
    "bfe.s32 %y, %x0, %x1, %x2;": ((U, U, U), U, lambda a, b, c: bfe(a, b, c, 32, True)),
    "bfe.s64 %y, %x0, %x1, %x2;": ((W, U, U), W, lambda a, b, c: bfe(a, b, c, 64, True)),
    "prmt.b32 %y, %x0, %x1, %x2;": ((U, U, U), U, prmt),
    "lop3.b32 %y, %x0, %x1, %x2, 0xEA;": ((U, U, U), U, lambda a, b, c: a & b | c),
    "lop3.b32 %y, %x0, 0x000F000F, 0x43004300, 0xEA;": ((U,), U, lambda a: a & 0xF000F | 0x43004300),
    "lop3.b32 %y, %x0, %x1, %x2, 0x96;": ((U, U, U), U, lambda a, b, c: a ^ b ^ c),
    "shf.l.wrap.b32 %y, %x0, %x1, %x2;": ((U, U, U), U, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf.r.wrap.b32 %y, %x0, %x1, %x2;": ((U, U, U), U, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "bar.warp.sync -1; or.b16 %y, %x0, 17152;": ((H,), H, lambda a: a | 17152),
    "cvt.s64.s32 %y, %x0;": ((U,), W, s),
    "cvt.u64.u32 %y, %x0;": ((U,), W, lambda a: a),
    "cvt.u32.u64 %y, %x0;": ((W,), U, lambda a: a),
    "cvt.s32.s16 %y, %x0;": ((H,), U, lambda a: signed(a, 16)),
    "mov.b32 {%h0, %h1}, %x0; mov.b32 %y, {%h1, %h0};": ((U,), U, lambda a: a >> 16 | a << 16),
    "mov.b64 {%r1, %r2}, %x0; mov.b64 %y, {%r2, %r1};": ((W,), W, lambda a: a >> 32 | a << 32),
    "setp.lt.s32 %p0, %x0, %x1; selp.b32 %y, %x0, 7, %p0;": ((U, U), U, lambda a, b: a if s(a) < s(b) else 7),
    "setp.lt.u32 %p0, %x0, %x1; mov.u32 %y, 0x0; @%p0 mov.b32 %y, %x0; @!%p0 add.s32 %y, %y, 3;": (
        (U, U), U, lambda a, b: a if a < b else 3,
    ),
    "setp.ne.b32 %p0, %x0, %x1; mov.pred %p1, -1; and.pred %p2, %p0, %p1; selp.b32 %y, 1, 2, %p2;": (
        (U, U), U, lambda a, b: 1 if a != b else 2,
    ),
    "{ .reg .b32 %x0, t; mov.b32 %x0, 5; add.s32 t, %x0, 1; mov.b32 %y, t; } add.s32 %y, %y, %x0;": (
        (U,), U, lambda a: a + 6,
    ),
    "shfl.sync.idx.b32 %y, %x0, 3, 31, -1; sub.s32 %y, %y, %y;": ((U,), U, lambda a: 0),
}  # fmt: skip


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text: str) -> None:
    kinds, result, oracle = INTEGERS[text]
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, np.iinfo(kind).max, 32, kind, endpoint=True) for kind in kinds]
    if text.startswith(("sh", "bfe")):  # amounts: small ones, and some far beyond the width
        inputs[1:] = [np.where(rng.random(32) < 0.8, amount % 70, amount).astype(U) for amount in inputs[1:]]
    got = evaluate(text, inputs, result).tolist()
    assert got == [
        oracle(*lane) % 2 ** (8 * np.dtype(result).itemsize) for lane in zip(*(x.tolist() for x in inputs), strict=True)
    ]


FORMATS = {"bf16": (8, -133, 16), "f16": (11, -24, 16), "f32": (24, -149, 32)}  # precision, least exponent, bits


def exact(bits: int, kind: str) -> Fraction:
    if kind == "f32":
        return Fraction(float(np.uint32(bits).view(np.float32)))
    tensor = torch.tensor([signed(bits, 16)], dtype=torch.int16)
    return Fraction(tensor.view(torch.bfloat16 if kind == "bf16" else torch.float16).double().item())


def nearest(value: Fraction, kind: str) -> Fraction | None:
    """Round once, to nearest, ties to even; None: too large."""
    precision, least, _ = FORMATS[kind]
    exponent = least
    while abs(value) >= Fraction(2) ** (exponent + precision):
        exponent += 1
    rounded = round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent
    top = {"bf16": 128, "f16": 16, "f32": 128}[kind]
    return rounded if abs(rounded) < Fraction(2) ** top else None


def random_bits(kind: str, count: int, spread: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Finite values; `spread` says over how many binades around one, 0: over all, the subnormal ones too."""
    bits = FORMATS[kind][2]
    values = rng.integers(0, 2**bits, count, np.uint64)
    mantissa = FORMATS[kind][0] - 1
    width = bits - 1 - mantissa
    exponents = (
        rng.integers(0, 2**width - 1, count) if not spread else rng.integers(0, spread, count) + 2 ** (width - 1)
    )
    keep = np.uint64((1 << (bits - 1)) | ((1 << mantissa) - 1))
    return ((values & keep) | (exponents.astype(np.uint64) << np.uint64(mantissa))).astype(
        np.uint16 if bits == 16 else U
    )


@pytest.mark.parametrize("spread", [0, 4])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn"])
@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_floats_are_rounded_once(kind: str, name: str, spread: int) -> None:
    rng = np.random.default_rng(1)
    operands = 3 if name == "fma.rn" else 2
    lanes = 32 if kind == "f32" else 64
    raw = [random_bits(kind, lanes, spread, rng) for _ in range(operands)]
    if name == "mul" and not spread:  # products around the smallest numbers, where rounding twice would show
        raw[1] = random_bits(kind, lanes, 2, rng) ^ raw[1].dtype.type(1 << (FORMATS[kind][2] - 2))
    text = f"{name}.{kind}{'' if kind == 'f32' else 'x2'} %y, " + ", ".join(f"%x{i}" for i in range(operands)) + ";"
    got = evaluate(text, [x.view(U) for x in raw], U).view(raw[0].dtype).tolist()
    function = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
                "fma.rn": lambda a, b, c: a * b + c}[name]  # fmt: skip
    for bits, lane in zip(got, zip(*(x.tolist() for x in raw), strict=True), strict=True):
        expected = nearest(function(*(exact(one, kind) for one in lane)), kind)
        if expected is not None:
            assert exact(bits, kind) == expected, (text, lane)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_are_those_of_torch(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    a[:3] = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1e6])  # two ties, and what float16 does not hold
    packed = evaluate(f"cvt.rn.{kind}x2.f32 %y, %x0, %x1;", [a.numpy(), b.numpy()], U)  # the first one above
    assert np.array_equal(
        packed.view(H), torch.stack([b, a], 1).to(dtype).view(torch.int16).numpy().view(H).reshape(-1)
    )
    single = evaluate(f"cvt.rn.{kind}.f32 %y, %x0;", [a.numpy()], H)
    assert np.array_equal(single.view(np.int16), a.to(dtype).view(torch.int16).numpy())
    wide = evaluate(f"cvt.f32.{kind} %y, %x0;", [single], np.float32)
    assert np.array_equal(wide, a.to(dtype).float().numpy())


@pytest.mark.parametrize("seed", range(4))
def test_a_barrier_orders_warps(seed: int) -> None:
    """Oracle: what thread i stored is read by thread 127 - i, again and again."""
    out = np.zeros(128, U)
    run(
        """ld.param.b64 %w0, [k_param_0]; mov.u32 %r0, %tid.x; mad.wide.u32 %w0, %r0, 4, %w0; mov.b32 %r1, global_smem;
        shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; sub.s32 %r4, %r1, %r2; mov.b32 %r5, 0; mov.b32 %r7, 0;
        again: add.s32 %r6, %r0, %r5; st.shared.b32 [ %r3 + 0 ], %r6; bar.sync 0; ld.shared.b32 %r8, [%r4+508];
        add.s32 %r7, %r7, %r8; add.s32 %r5, %r5, 1; setp.lt.s32 %p0, %r5, 3; bar.sync 0; @%p0 bra again;
        st.global.b32 [%w0], %r7;""",
        [out], threads=128, seed=seed,
    )  # fmt: skip
    assert out.tolist() == [3 * (127 - i) + 3 for i in range(128)]


def test_atomics_of_all_blocks_add_up() -> None:
    count, before = np.zeros(1, U), np.zeros(64, U)
    run(
        """ld.param.b64 %w0, [k_param_0]; ld.param.b64 %w1, [k_param_1]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
        mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x; mad.lo.s32 %r1, %r3, %r4, %r1;
        setp.lt.u32 %p0, %r0, 16; shl.b32 %r2, %r1, 4; add.s32 %r2, %r2, %r0; mad.wide.u32 %w1, %r2, 4, %w1;
        mov.b32 %r7, 1; @%p0 atom.global.gpu.acq_rel.add.u32 %r5, [ %w0 + 0 ], %r7; @%p0 st.global.b32 [%w1], %r5;""",
        [count, before], grid=(2, 2), seed=3,
    )  # fmt: skip
    assert count[0] == 64
    assert sorted(before.tolist()) == list(range(64))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_product_of_one_warp(kind: str) -> None:
    """Oracle: numpy, and the places that the instruction's description gives to a lane's values. Exact: small integers.

    Beside it a matrix that nobody wrote is loaded: it is NaN, and no error unless it is used.
    """
    rng = np.random.default_rng(3)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (8, 16), (16, 8)))
    half = torch.bfloat16 if kind == "bf16" else torch.float16
    bits = [torch.from_numpy(x).to(half).view(torch.int16).numpy().view(H) for x in (a, b)]
    words, out = np.zeros((32, 12), U), np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        pairs = [bits[0][row, column : column + 2] for column in (t, t + 8) for row in (g, g + 8)]
        pairs += [bits[1][g, column : column + 2] for column in (t, t + 8)]
        words[lane, :6] = [int(low) | int(high) << 16 for low, high in pairs]
        words[lane, 8:] = np.array([c[g, t], c[g, t + 1], c[g + 8, t], c[g + 8, t + 1]]).view(U)
    run(
        f""".reg .b32 %m<4>;
        ld.param.b64 %w0, [k_param_0]; ld.param.b64 %w1, [k_param_1]; mov.u32 %r0, %tid.x; mov.b32 %r1, global_smem;
        mad.wide.u32 %w0, %r0, 48, %w0; mad.wide.u32 %w1, %r0, 16, %w1; shl.b32 %r2, %r0, 4; add.s32 %r2, %r2, %r1;
        ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%w0]; ld.global.v2.b32 {{%a4, %a5}}, [%w0+16];
        ld.global.v4.b32 {{%m0, %m1, %m2, %m3}}, [%w0+32];
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%m0, %m1, %m2, %m3}}, {{%a0, %a1, %a2, %a3}},
            {{%a4, %a5}}, {{%m0, %m1, %m2, %m3}};
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%a0, %a1, %a2, %a3}}, [%r2];
        st.global.v4.b32 [%w1], {{%m0, %m1, %m2, %m3}};""",
        [words, out],
    )
    want = a @ b.T + c
    for lane, h, e in np.ndindex(32, 2, 2):
        assert out[lane, 2 * h + e] == want[lane // 4 + 8 * h, 2 * (lane % 4) + e]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_through_shared_memory(transposed: bool) -> None:
    """Oracle: lane 4 r + c holds elements (r, 2 c) and (r, 2 c + 1), or, transposed, (2 c, r) and (2 c + 1, r)."""
    source, out = np.arange(256, dtype=H), np.zeros((32, 4), U)
    trans = ".trans" if transposed else ""
    run(
        f"""ld.param.b64 %w0, [k_param_0]; ld.param.b64 %w1, [k_param_1]; mov.u32 %r0, %tid.x; mov.b32 %r1, global_smem;
        mad.wide.u32 %w0, %r0, 16, %w0; mad.wide.u32 %w1, %r0, 16, %w1; shl.b32 %r2, %r0, 4; add.s32 %r2, %r2, %r1;
        ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%w0]; st.shared.v4.b32 [%r2], {{%a0, %a1, %a2, %a3}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%a4, %a5, %a6, %a7}}, [%r2]; bar.sync 0;
        st.global.v4.b32 [%w1], {{%a4, %a5, %a6, %a7}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2+512], {{%a4, %a5, %a6, %a7}};
        ld.shared.v4.b32 {{%a4, %a5, %a6, %a7}}, [%r2+512]; st.global.v4.b32 [%w0], {{%a4, %a5, %a6, %a7}};""",
        [source, out],
    )
    for lane, i, e in np.ndindex(32, 4, 2):
        r, c = lane // 4, 2 * (lane % 4) + e
        assert out[lane, i] >> 16 * e & 0xFFFF == 64 * i + (8 * c + r if transposed else 8 * r + c)
    assert source.tolist() == list(range(256))  # stmatrix is the inverse


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 64), (-2, 40), (9, -8), (20, 0)])
@pytest.mark.parametrize("swizzle", [0, 128])
def test_copies_bring_boxes_with_zeros_around(swizzle: int, row: int, column: int, seed: int) -> None:
    """Oracle: a padded matrix; with swizzle, bits 4 to 6 of an address are xored with bits 7 to 9."""
    matrix = np.random.default_rng(2).integers(1, 2**16, (12, 104), H)
    out = np.zeros(8 * 128, np.uint8)
    body = f"""ld.param.b64 %w0, [k_param_1]; mov.b64 %w1, k_param_0; cvta.param.u64 %w1, %w1; mov.u32 %r0, %tid.x;
        mov.b32 %r1, global_smem; add.s32 %r2, %r1, 4096; elect.sync %r3|%p0, -1; setp.lt.u32 %p2, %r0, 32;
        and.pred %p0, %p0, %p2; @%p0 mbarrier.init.shared::cta.b64 [%r2], 1; fence.proxy.async.shared::cta; bar.sync 0;
        @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024; mov.b32 %r4, {column}; mov.b32 %r5, {row};
        @%p0 {COPY} [%r1], [%w1, {{%r4, %r5}}], [%r2]; {wait("%r2")} shl.b32 %r6, %r0, 4; add.s32 %r7, %r1, %r6;
        ld.shared.v4.b32 {{%a0, %a1, %a2, %a3}}, [%r7]; cvt.u64.u32 %w2, %r6; add.s64 %w0, %w0, %w2;
        st.global.v4.b32 [%w0], {{%a0, %a1, %a2, %a3}}; bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r2];"""
    run(body, [(matrix, (8, 64), swizzle), out], threads=64, seed=seed)
    padded = np.zeros((60, 300), H)
    padded[20:32, 100:204] = matrix
    box = padded[20 + row : 28 + row, 100 + column : 164 + column]
    for r, byte in np.ndindex(8, 128):
        address = r * 128 + byte
        if swizzle:
            address ^= (address >> 7 & 7) << 4
        assert out[address] == int(box[r, byte // 2]) >> 8 * (byte % 2) & 255


def test_halves_that_nobody_wants() -> None:
    """What LLVM makes of a value that is not used: a half that was never written, and `_`. Read, it would be a NaN."""
    low = np.random.default_rng(3).integers(0, 2**16, 32, H)
    found = evaluate(".reg .b32 %pair; mov.b32 %pair, {%x0, %h1}; mov.b32 {%y, _}, %pair;", [low], H)
    assert found.tolist() == low.tolist()
    both = evaluate("mov.b32 %y, {%x0, %h1};", [low], U)
    assert both.tolist() == (low.astype(U) | 0xFFFF0000).tolist()


def test_buffers_have_ends() -> None:
    memory = ptx_machine.Memory()
    first, second = memory.add(np.zeros(3, U)), memory.add(np.zeros((2, 2), H))
    assert first % 256 == second % 256 == 0
    assert memory.find(first + 8, first + 8, 4)[1] == first
    for address in (first - 4, first + 12, second - 4):
        with pytest.raises(ptx_machine.AccessError, match=f"{address:#x}"):
            memory.find(address, address, 4)
