"""Copies of lanes (cp.async) on the emulated machine: what lands when, and every misuse that it must find.

Oracles: the bytes that were to be copied; each hazard is a small change of one sound kernel.
"""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_machine import AccessError, DivergenceError, HazardError, MachineError
from ptx_snippets import run

# 64 threads copy 16 bytes each, twice, and store what their neighbours of the other warp have copied.
ISSUE = "cp.async.cg.shared.global [ %r2 + 0 ], [ %w1 + 0 ], 0x10, %r5;\n"
SECOND = "cp.async.cg.shared.global [ %r2 + 1024 ], [ %w1 + 1024 ], 0x10;\n"
COMMIT, WAIT, SYNC = "cp.async.commit_group;\n", "cp.async.wait_group 0;\n", "bar.sync 0;\n"
READ = "ld.shared.v4.b32 {%a0, %a1, %a2, %a3}, [%r4];\n"
STORE = "st.global.v4.b32 [%w2], {%a0, %a1, %a2, %a3};\n"
BEGIN = """ld.param.b64 %w1, [k_param_0]; ld.param.b64 %w2, [k_param_1]; mov.u32 %r0, %tid.x; mov.b32 %r1, global_smem;
shl.b32 %r2, %r0, 4; xor.b32 %r4, %r2, 512; add.s32 %r2, %r1, %r2; add.s32 %r4, %r1, %r4; cvt.u64.u32 %w3, %r0;
shl.b64 %w3, %w3, 4; add.s64 %w1, %w1, %w3; add.s64 %w2, %w2, %w3; mov.b32 %r5, 16; setp.lt.u32 %p0, %r0, 40;
"""
SOUND = BEGIN + ISSUE + COMMIT + SECOND + COMMIT + WAIT + SYNC + READ + STORE


def copied(text: str = SOUND, **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run it; returns what it stored, 16 bytes a thread, and what it was to copy in its first copy."""
    source = np.random.default_rng(4).integers(0, 256, (128, 16), np.uint8)
    out = np.zeros((64, 16), np.uint8)
    run(text, [source, out], threads=64, **options)
    return out, np.roll(source[:64], 32, axis=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_copies_bring_what_was_to_be_copied(lazy: bool, seed: int) -> None:
    got, expected = copied(lazy=lazy, seed=seed)
    assert (got == expected).all()
    one_left = SOUND.replace("wait_group 0", "wait_group 1")
    all_waited = SOUND.replace(COMMIT + WAIT, "cp.async.wait_all;\n")
    hinted = SOUND.replace("cp.async.cg.shared.global", "cp.async.ca.shared::cta.global.L2::128B")
    for text in (one_left, all_waited, hinted):
        got, expected = copied(text, lazy=lazy, seed=seed)
        assert (got == expected).all()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("width", [4, 8, 16])
def test_what_is_not_read_is_zero(width: int, lazy: bool) -> None:
    """Each lane reads another number of bytes, and its source ends where the buffer does: no address beyond is read."""
    source, out = np.arange(1, 32 * width + 1, dtype=np.uint8), np.zeros((32, width), np.uint8)
    run(
        f"""ld.param.b64 %w1, [k_param_0]; ld.param.b64 %w2, [k_param_1]; mov.u32 %r0, %tid.x;
        mov.b32 %r1, global_smem; mul.lo.s32 %r2, %r0, {width}; add.s32 %r3, %r1, %r2; cvt.u64.u32 %w3, %r2;
        add.s64 %w2, %w2, %w3; rem.s32 %r5, %r0, {width + 1}; setp.eq.b32 %p0, %r5, 0; add.s64 %w1, %w1, %w3;
        @%p0 add.s64 %w1, %w1, 4096; cp.async.ca.shared.global [%r3], [%w1], {width}, %r5; cp.async.wait_all;
        mov.b32 %r6, 0; again: add.s32 %r7, %r3, %r6; ld.shared.b8 %h0, [%r7]; cvt.u64.u32 %w4, %r6;
        add.s64 %w4, %w2, %w4; st.global.b8 [%w4], %h0; add.s32 %r6, %r6, 1; setp.lt.s32 %p1, %r6, {width};
        @%p1 bra again;""",
        [source, out], lazy=lazy,
    )  # fmt: skip
    for lane in range(32):
        count = lane % (width + 1)
        assert out[lane].tolist() == [*source[lane * width :][:count], *[0] * (width - count)]


def test_some_lanes_may_copy() -> None:
    text = SOUND.replace(ISSUE, "@%p0 " + ISSUE).replace(READ, "setp.lt.u32 %p1, %r0, 8; " + "@%p1 " + READ)
    text = text.replace(STORE, "@%p1 " + STORE)
    got, expected = copied(text)
    assert (got[:8] == expected[:8]).all()
    assert not got[8:].any()


def test_a_kernel_may_end_before_its_copies() -> None:
    copied(BEGIN + ISSUE + COMMIT + SECOND)


@pytest.mark.parametrize("late", [False, True])
def test_the_source_may_be_read_until_the_wait(late: bool) -> None:
    """What changes after the copy began arrives or not, as late copies do."""
    source, out = np.zeros((128, 16), np.uint8), np.zeros((64, 16), np.uint8)
    changed = "st.global.b32 [%w1], -1;"
    run(SOUND.replace(COMMIT, COMMIT + changed, 1), [source, out], threads=64, lazy=late)
    assert (out[:, :4] == (255 if late else 0)).all()


AGAIN = ISSUE + COMMIT + WAIT
HAZARDS: dict[str, tuple[str, str, Any, str]] = {  # what is replaced, by what, what must be raised
    "no wait": (WAIT, "", HazardError, "a copy under way writes at .*ld.shared"),
    "wait for too few": (WAIT, WAIT.replace("0", "2"), HazardError, "a copy under way writes at .*ld.shared"),
    "no group": (COMMIT + SECOND + COMMIT, "", HazardError, "a copy under way writes"),
    "no barrier": (SYNC, "", MachineError, "copy under way|after the store of another warp|nothing has written"),
    "barrier before the wait": (
        WAIT + SYNC, SYNC + WAIT, HazardError, "a copy under way writes|orders after the store of another warp",
    ),
    "own bytes before the wait": (WAIT, "ld.shared.b32 %r9, [%r2];" + WAIT, HazardError, "a copy under way writes"),
    "store over a copy": (WAIT, "st.shared.b32 [%r2], %r0;" + WAIT, HazardError, "a store to .* a copy"),
    "copy over a copy": (WAIT, ISSUE + WAIT, HazardError, "another copy under way"),
    "lanes of one place": (WAIT, WAIT + ISSUE.replace("%r2", "%r1"), HazardError, "another copy under way"),
    "copy over what another warp reads": (
        READ, READ + ISSUE, HazardError, "a write that nothing orders after the read|a copy under way writes",
    ),
    "copy over what another warp stored": (
        WAIT + SYNC, WAIT + SYNC + "st.shared.b32 [%r2], %r0;" + AGAIN.replace("%r2", "%r4"), HazardError,
        "orders after the store of another warp|a store to .* a copy",
    ),
    "barrier over it": (WAIT, "mbarrier.init.shared::cta.b64 [%r2], 1;", HazardError, "a barrier where a copy"),
    "copy into a barrier": (
        WAIT, WAIT + "bar.sync 0; mbarrier.init.shared::cta.b64 [%r2], 1;" + ISSUE, HazardError, "or into a barrier",
    ),
    "before the grid": (STORE, STORE + "griddepcontrol.wait;", HazardError, "before griddepcontrol.wait"),
    "source outside": (ISSUE, ISSUE.replace("%w1 + 0", "%w1 + 8192"), AccessError, "outside of every buffer"),
    "source not aligned": (ISSUE, ISSUE.replace("%w1 + 0", "%w1 + 8"), AccessError, "source of a copy is not aligned"),
    "target not aligned": (ISSUE, ISSUE.replace("%r2 + 0", "%r2 + 8"), AccessError, "not aligned to 16"),
    "target outside": (ISSUE, ISSUE.replace("%r2 + 0", "%r2 + 8192"), AccessError, "outside of 8192 bytes"),
    "too many bytes": ("mov.b32 %r5, 16;", "mov.b32 %r5, 17;", MachineError, "16 bytes is to read 17"),
    "commit of some lanes": (COMMIT, "@%p0 " + COMMIT, DivergenceError, "only some lanes close"),
    "wait of some lanes": (WAIT, "@%p0 " + WAIT, DivergenceError, "only some lanes close or wait"),
    "warp barrier of some lanes": (WAIT, WAIT + "@%p0 bar.warp.sync -1;", DivergenceError, "only some lanes"),
    "cg of 8 bytes": (ISSUE, ISSUE.replace("0x10", "0x8"), NotImplementedError, "cp.async.cg"),
    "predicate for the source": (ISSUE, ISSUE.replace("%r5", "%p0"), NotImplementedError, "ignores the source"),
    "unknown hint": (ISSUE, ISSUE.replace("global ", "global.L2::cache_hint ", 1), NotImplementedError, "cache_hint"),
}  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", HAZARDS)
def test_misuse_is_found(name: str, seed: int, lazy: bool) -> None:
    old, new, error, message = HAZARDS[name]
    assert old in SOUND
    with pytest.raises(error, match=message):
        copied(SOUND.replace(old, new, 1), seed=seed, lazy=lazy)


@pytest.mark.parametrize("seed", range(3))
def test_warps_may_store_the_same_value_to_one_place(seed: int) -> None:
    """As Triton does with a value that all threads have; two values there are a race, and so is a read in between."""
    out = np.zeros(64, np.uint32)
    text = """ld.param.b64 %w1, [k_param_0]; mov.u32 %r0, %tid.x; mov.b32 %r1, global_smem; shr.u32 %r2, %r0, 5;
        mad.wide.u32 %w1, %r0, 4, %w1; mov.b32 %r3, 7; st.shared.b32 [%r1], %r3; bar.sync 0; ld.shared.b32 %r4, [%r1];
        st.global.b32 [%w1], %r4;"""
    run(text, [out], threads=64, seed=seed)
    assert (out == 7).all()
    for wrong in (text.replace("%r3; bar", "%r2; bar"), text.replace("bar.sync 0; ld", "ld")):
        with pytest.raises(HazardError, match="nothing orders after the store"):
            run(wrong, [out], threads=64, seed=seed)
