"""Products and copies of the emulated machine, and every misuse of them that it must find.

Oracles: numpy for a product, with loops over the manual's fragments; each hazard is a small change of one sound kernel.
"""

from typing import Any

import numpy as np
import ptx_machine
import pytest
from numpy.typing import NDArray
from ptx_machine import AccessError, DeadlockError, DivergenceError, HazardError, UndefinedError
from ptx_machine.values import narrow, widen
from ptx_snippets import COPY, kernel, run, wait

# Two steps of a product of [64, 16] by [16, 16] (k16): A from registers, B [columns, k] by a copy.
BEGIN = f"""ld.param.b64 %w1, [k_param_1]; ld.param.b64 %w2, [k_param_2]; mov.b64 %w0, k_param_0;
cvta.param.u64 %w0, %w0; mov.u32 %r0, %tid.x; mov.b32 %r1, global_smem; add.s32 %r2, %r1, 4096;
setp.eq.b32 %p0, %r0, 0; mov.b32 %r4, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 2048;
@%p0 {COPY} [%r1], [%w0, {{%r4, %r4}}], [%r2];
"""
OPERANDS = """mad.wide.u32 %w3, %r0, 32, %w1; mad.wide.u32 %w4, %r0, 32, %w2;
ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%w3];
ld.global.v4.b32 {%a4, %a5, %a6, %a7}, [%w3+16];
bfe.u32 %r3, %r1, 4, 14; cvt.u64.u32 %w5, %r3; or.b64 %w5, %w5, 4611686293305294848; add.s64 %w6, %w5, 2;
mov.pred %p1, -1;
"""
D, A0, A1 = "{%d0,%d1,%d2,%d3,%d4,%d5,%d6,%d7}", "{%a0,%a1,%a2,%a3}", "{%a4,%a5,%a6,%a7}"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
PRODUCTS = f"""wgmma.fence.sync.aligned;
{PRODUCT} {D}, {A0}, %w5, 0, 1, 1, 0;
{PRODUCT} {D}, {A1}, %w6, %p1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
"""
END = """wgmma.wait_group.sync.aligned 0;
st.global.v4.b32 [%w4], {%d0, %d1, %d2, %d3}; st.global.v4.b32 [%w4+16], {%d4, %d5, %d6, %d7};
"""
SOUND = BEGIN + wait("%r2") + OPERANDS + PRODUCTS + END


def fragments(a: NDArray[Any]) -> NDArray[np.uint32]:
    """Words [128, 8] that the threads hold of 16 bits [64, 32]: a0..a3 of the first 16 columns, then of the others."""
    words = np.zeros((128, 8), np.uint32)
    for thread, step, i in np.ndindex(128, 2, 4):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 2)
        column = 16 * step + 2 * (thread % 4) + 8 * (i // 2)
        words[thread, 4 * step + i] = int(a[row, column]) | int(a[row, column + 1]) << 16
    return words


def product(text: str = SOUND, kind: str = "bf16", **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run it; returns what it stored, [64, 16], and the operands' product."""
    rng = np.random.default_rng(5)
    a, b = (narrow(rng.standard_normal(shape, np.float32), kind) for shape in ((64, 32), (16, 64)))
    out = np.full((128, 8), np.nan, np.float32)
    source = (b, (16, 64), 128) if COPY in text else b
    run(text.replace("bf16", kind), [source, fragments(a), out], threads=128, **options)
    d = np.zeros((64, 16), np.float32)
    for thread, i in np.ndindex(128, 8):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
        d[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2] = out[thread, i]
    return d, widen(a, kind).astype(np.float64) @ widen(b, kind).astype(np.float64)[:, :32].T


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_product_is_that_of_numpy(kind: str, lazy: bool, seed: int) -> None:
    got, expected = product(kind=kind, lazy=lazy, seed=seed)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_product_may_be_negated_and_added_to_an_accumulator() -> None:
    text = SOUND.replace(
        "mov.pred %p1, -1;", "mov.pred %p1, -1;" + "".join(f"mov.b32 %d{i}, 0f3F800000;" for i in range(8))
    )
    text = text.replace("%w5, 0, 1, 1, 0", "%w5, %p1, -1, 1, 0").replace("%w6, %p1, 1, 1, 0", "%w6, %p1, 1, -1, 0")
    got, expected = product(text)
    np.testing.assert_allclose(got, 1 - expected, rtol=1e-5, atol=1e-5)


def test_a_group_may_stay_under_way_while_operands_of_the_one_before_change() -> None:
    """Oracle: the first step's product twice."""
    again = PRODUCTS.replace("wgmma.commit", "wgmma.commit", 1)
    first, second = again.split(f"{PRODUCT} {D}, {A1}")
    two = first + "wgmma.commit_group.sync.aligned;\n" + f"{PRODUCT} {D}, {A1}" + second
    text = (
        BEGIN + wait("%r2") + OPERANDS + two + "wgmma.wait_group.sync.aligned 1; mov.b32 %a0, 0; mov.b32 %a3, 0;" + END
    )
    got, expected = product(text)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


COMMIT, WAITED = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
AGAIN = f"@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 2048;\n@%p0 {COPY} [%r1], [%w0, {{%r4, %r4}}], [%r2];\n"
READ = "ld.shared.b32 %r9, [%r1];\n"
STORE = "@%p0 st.shared.b32 [%r1], %r0;\n"
FAR = "add.s32 %r8, %r1, 2048;\n"
HAZARDS: dict[str, tuple[str, str, type[Exception], str]] = {  # what is replaced, by what, what must be raised
    "accumulator read": (COMMIT, COMMIT + "mov.b32 %r9, %d3;", HazardError, "an accumulator .* mov.b32 %r9, %d3"),
    "accumulator written": (COMMIT, COMMIT + "mov.b32 %d3, 0;", HazardError, "an accumulator .* mov.b32 %d3, 0"),
    "accumulator of one group left": (WAITED, WAITED.replace("0", "1"), HazardError, "an accumulator .* st.glob"),
    "accumulator as operand": (
        COMMIT, f"{PRODUCT} {D.replace('d', 'r2')}, {{%d0,%d1,%d2,%d3}}, %w5, 0, 1, 1, 0;" + COMMIT,
        HazardError, "is an accumulator of a product",
    ),
    "operand written": (COMMIT, COMMIT + "mov.b32 %a2, 0;", HazardError, "an operand .* mov.b32 %a2, 0"),
    "operand loaded": (
        COMMIT, COMMIT + "ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%w3];", HazardError, "an operand .* ld.global.v4",
    ),
    "no commit": (COMMIT, "", HazardError, "an accumulator"),
    "no fence": ("wgmma.fence.sync.aligned;\n", "", HazardError, "no wgmma.fence since %a0"),
    "no fence of accumulators": (
        f"{PRODUCT} {D}, {A1}", f"mov.b32 %a5, 1;\n{PRODUCT} {D}, {A1}", HazardError, "no wgmma.fence since %a5",
    ),
    "end with products": (END, "", HazardError, "ends while products"),
    "end with a copy": (END, END + "bar.sync 0;" + AGAIN, HazardError, "ends while copies|nobody has waited"),
    "copy over a product's operand": (COMMIT, COMMIT + AGAIN, HazardError, "a copy into shared memory that a product"),
    "copy too early after products": (
        END, END + AGAIN + wait("%r2", 1), HazardError,
        "a copy into shared memory that a product|orders after the read of another warp",
    ),
    "product of what comes": (
        "mov.pred %p1, -1;", "bar.sync 0;" + AGAIN + "bar.sync 0;", HazardError, "a copy under way|waited for the copy",
    ),
    "load of what comes": (
        "mov.pred %p1, -1;", "mov.pred %p1, -1; bar.sync 0;" + AGAIN + "bar.sync 0;" + READ, HazardError,
        "(a copy under way|waited for the copy).*ld.shared",
    ),
    "two copies to one place": (WAITED, WAITED + "bar.sync 0;" + AGAIN + AGAIN, HazardError, "arrivals|another copy"),
    "store over a copy": (WAITED, WAITED + "bar.sync 0;" + AGAIN + STORE, HazardError, "a store to .* a copy"),
    "store over a product's operand": (COMMIT, COMMIT + STORE, HazardError, "a store to .* that a product under way"),
    "product of a store": (
        "wgmma.fence", STORE + "bar.sync 0;\nwgmma.fence", HazardError, "what a store wrote, without fence.proxy",
    ),
    "copy over a store": (WAITED, WAITED + "bar.sync 0;" + STORE + AGAIN, HazardError, "a copy into what a store"),
    "store without order": (
        WAITED, WAITED + FAR + "st.shared.b32 [%r8], %r0;", HazardError, "orders after the store of another warp",
    ),
    "load without order": (
        WAITED, WAITED + FAR + "@%p0 st.shared.b32 [%r8], %r0;\nld.shared.b32 %r9, [%r8];",
        (HazardError, UndefinedError), "orders after the store of another warp|nothing has written",
    ),
    "load of nothing": (WAITED, WAITED + FAR + "ld.shared.b32 %r9, [%r8];", UndefinedError, "nothing has written"),
    "load of a barrier": (WAITED, WAITED + "ld.shared.b32 %r9, [%r2];", UndefinedError, "nothing has written"),
    "load outside": (WAITED, WAITED + "ld.shared.b32 %r9, [%r1+8192];", AccessError, "outside of 8192 bytes"),
    "copy that only another warp has waited for": (
        wait("%r2"), "setp.lt.u32 %p3, %r0, 96; @%p3 bra over;" + wait("%r2") + "over:", (HazardError, UndefinedError),
        "a copy under way|waited for the copy|nothing has written",
    ),
    "load not aligned": (WAITED, WAITED + "ld.shared.b32 %r9, [%r1+2];", AccessError, "not aligned to 4"),
    "global load outside": (WAITED, WAITED + "ld.global.b32 %r9, [%w3+4096];", AccessError, "0x7f.* ld.global"),
    "global load not aligned": (WAITED, WAITED + "ld.global.b32 %r9, [%w3+2];", AccessError, "not aligned to 4"),
    "no tensor map": (f"@%p0 {COPY} [%r1], [%w0,", f"@%p0 {COPY} [%r1], [%w1,", AccessError, "no tensor map"),
    "register of nothing": (WAITED, WAITED + "add.s32 %r9, %r39, 1;", UndefinedError, "nothing has written %r39"),
    "operand of nothing": ("ld.global.v4.b32 {%a4, %a5, %a6, %a7}, [%w3+16];",
        "", UndefinedError, "written an operand"),
    "sum onto nothing": ("%w5, 0, 1, 1, 0;", "%w5, 1, 1, 1, 0;", UndefinedError, "that a product adds to"),
    "branch of some lanes": (WAITED, WAITED + "@%p0 bra end; end:", DivergenceError, "a branch that only some"),
    "barrier of some lanes": (WAITED, WAITED + "@%p0 bar.sync 0;", DivergenceError, "a barrier that only some"),
    "product of some lanes": (f"{PRODUCT} {D}, {A1}", f"@%p0 {PRODUCT} {D}, {A1}", HazardError, "only some lanes"),
    "nothing arrives": ("@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 2048;\n", "", DeadlockError, "try_wait"),
    "too few bytes": ("[%r2], 2048;", "[%r2], 4096;", DeadlockError, "4 warps wait for ever after line"),
    "wrong parity": (
        "[%r2], 0;", "[%r2], 1;", (HazardError, UndefinedError),
        "a copy under way|waited for the copy|nothing has written",
    ),
    "too many arrivals": (
        WAITED, WAITED + "bar.sync 0;" + 2 * "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16;\n",
        HazardError, "more arrivals",
    ),
    "no barrier": ("@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;\n", "", UndefinedError, "no barrier was made"),
    "barrier not fenced": ("fence.proxy.async.shared::cta;\n", "", HazardError, "a copy to a barrier without a fence"),
    "barrier not ordered": (
        "bar.sync 0;\n@%p0 mbarrier.arrive", "@%p0 mbarrier.arrive", (HazardError, UndefinedError),
        "orders this after warp 0 made|no barrier was made|nothing has written",
    ),
    "a warp does not come": (
        WAITED, WAITED + "setp.lt.u32 %p3, %r0, 32; @%p3 bra end; bar.sync 0; end:", DeadlockError, "3 warps wait",
    ),
    "before the grid": (END, END + "griddepcontrol.wait;", HazardError, "before griddepcontrol.wait"),
    "division by zero": (WAITED, WAITED + "div.s32 %r9, %r0, 0;", ptx_machine.MachineError, "division by zero"),
    "unknown instruction": (WAITED, WAITED + "sin.approx.f32 %r9, %r0;", NotImplementedError, "sin.approx.f32"),
    "unknown modifier": (WAITED, WAITED + "add.sat.s32 %r9, %r0, 1;", NotImplementedError, "add.sat.s32"),
    "B across": ("%w6, %p1, 1, 1, 0;", "%w6, %p1, 1, 1, 1;", NotImplementedError, "K-major"),
}  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", HAZARDS)
def test_misuse_is_found(name: str, seed: int, lazy: bool) -> None:
    old, new, error, message = HAZARDS[name]
    assert old in SOUND
    with pytest.raises(error, match=message):
        product(SOUND.replace(old, new, 1), seed=seed, lazy=lazy)


def test_what_lies_beside_is_not_taken_for_misuse() -> None:
    """A copy to another place, fenced stores and ordered ones run while a product is under way."""
    beside = FAR + "bar.sync 0;\n" + AGAIN.replace("[%r1]", "[%r8]") + wait("%r2", 1)
    beside += "ld.shared.b32 %r9, [%r8]; bar.sync 0; " + STORE.replace("%r1", "%r8") + "fence.proxy.async.shared::cta;"
    beside += "bar.sync 0; ld.shared.b32 %r9, [%r8]; bar.sync 0;" + AGAIN.replace("[%r1]", "[%r8]") + wait("%r2", 0)
    for seed in range(4):
        got, expected = product(SOUND.replace(COMMIT, COMMIT + beside), seed=seed)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# The same product, of what the lanes copy: each 16 bytes of a row, to where a tensor copy would put them.
WAITS, SYNC, FENCE = "cp.async.wait_group 0;\n", "bar.sync 0;\n", "fence.proxy.async.shared::cta;\n"
LANES = """ld.param.b64 %w0, [k_param_0]; ld.param.b64 %w1, [k_param_1]; ld.param.b64 %w2, [k_param_2];
mov.u32 %r0, %tid.x; mov.b32 %r1, global_smem; mad.wide.u32 %w0, %r0, 16, %w0; shl.b32 %r3, %r0, 4;
bfe.u32 %r4, %r0, 3, 3; shl.b32 %r4, %r4, 4; xor.b32 %r3, %r3, %r4; add.s32 %r3, %r1, %r3;
cp.async.cg.shared.global [%r3], [%w0], 16; cp.async.commit_group;
"""
ONE_WARP = "setp.lt.u32 %p3, %r0, 32; @!%p3 bra over;" + FENCE + "over:"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_product_of_what_lanes_copied_needs_a_fence_in_between(seed: int, lazy: bool) -> None:
    """Between the wait of who copied and the product, by whom ever: PTX asks for one along the chain of barriers."""
    for between in (WAITS + SYNC + FENCE, WAITS + FENCE + SYNC, WAITS + SYNC + ONE_WARP + SYNC):
        got, expected = product(LANES + between + OPERANDS + PRODUCTS + END, seed=seed, lazy=lazy)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for between in (WAITS + SYNC, FENCE + WAITS + SYNC, WAITS + ONE_WARP + SYNC, WAITS + SYNC + ONE_WARP):
        with pytest.raises(HazardError, match=r"without fence.proxy.async after the store"):
            product(LANES + between + OPERANDS + PRODUCTS + END, seed=seed, lazy=lazy)
    with pytest.raises(HazardError, match=r"a copy under way|nothing orders after the store|without fence"):
        product(LANES + SYNC + WAITS + FENCE + OPERANDS + PRODUCTS + END, seed=seed, lazy=lazy)
    again = "shl.b32 %r3, %r0, 4; add.s32 %r3, %r1, %r3;" + LANES[LANES.index("cp.async") :]
    again = LANES + WAITS + SYNC + FENCE + OPERANDS + PRODUCTS + again + END
    with pytest.raises(HazardError, match=r"a copy into shared memory that a product under way reads|after the read"):
        product(again, seed=seed, lazy=lazy)


def test_a_program_knows_its_kernel() -> None:
    program = ptx_machine.parse(kernel(SOUND, ["map", "u64", "u32"], threads=128))
    assert [(kind, size) for _, kind, size in program.params] == [("tensormap", 128), ("u64", 8), ("u32", 4)]
    assert program.threads == 128
    assert [one.target for one in program.instructions if one.opcode.startswith("bra")] != [-1]


@pytest.mark.parametrize(
    "change",
    [{"box": (300, 64)}, {"box": (16, 128)}, {"stride": 120}, {"address": 8}, {"swizzle": 16}, {"box": (16, 4)}],
)
def test_tensor_maps_are_those_of_the_hardware(change: dict[str, Any]) -> None:
    given = {"address": 256, "shape": (16, 64), "stride": 128, "box": (16, 64), "element": 2, "swizzle": 128}
    ptx_machine.TensorMap(**given)
    with pytest.raises(ValueError, match="no such tensor map"):
        ptx_machine.TensorMap(**given | change)
