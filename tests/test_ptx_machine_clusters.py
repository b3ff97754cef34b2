"""Clusters of the emulated machine, and every misuse of them that it must find.

Oracle: a sum by numpy; each hazard is a small change of one sound kernel.
"""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_machine import AccessError, DeadlockError, HazardError, MachineError
from ptx_snippets import run, wait

# Each thread of four blocks sends its number plus 1000 times that of its block to each block, and adds what has come.
BEGIN = """ld.param.b64 %w0, [k_param_0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; and.b32 %r2, %r1, 3;
mad.lo.s32 %r10, %r1, 1000, %r0; cvt.rn.f32.u32 %r10, %r10; mov.b32 %r3, global_smem; mov.b32 %r11, 0;
shl.b32 %r4, %r0, 2; add.s32 %r4, %r4, %r3; shl.b32 %r5, %r2, 8; add.s32 %r5, %r5, %r4; setp.eq.b32 %p0, %r0, 0;
"""
USED = "st.shared.b32 [%r4+16], %r0; ld.shared.b32 %r9, [%r4+16];\n"  # the memory has been in use
OPEN = """@%p0 mbarrier.init.shared::cta.b64 [%r3], 1; @%p0 fence.mbarrier_init.release.cluster;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;
"""
FENCE = "fence.release.sync_restrict::shared::cta.cluster;"
ARRIVE, WAIT = FENCE + "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.acquire.aligned;\n"
ONE = """mov.b32 %r6, RANK; add.s32 %r7, %r5, 16; mapa.shared::cluster.u32 %r7, %r7, %r6;
mapa.shared::cluster.u32 %r8, %r3, %r6;
st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%r7], %r10, [%r8];
"""
SEND = "".join(ONE.replace("RANK", str(rank)) for rank in range(4))
SUM = "".join(f"ld.shared.b32 %r9, [%r4+{16 + 256 * rank}]; add.f32 %r11, %r11, %r9;\n" for rank in range(4))
STORE = "mad.lo.s32 %r9, %r1, 64, %r0; mad.wide.u32 %w1, %r9, 4, %w0; st.global.b32 [%w1], %r11;\n"
SOUND = BEGIN + USED + OPEN + ARRIVE + WAIT + SEND + wait("%r3") + SUM + STORE


def sums(text: str, cluster: int = 4, **options: Any) -> NDArray[Any]:
    """What two clusters of blocks of 64 threads store."""
    out = np.zeros((2 * cluster, 64), np.float32)
    run(text, [out], 64, grid=(2,), cluster=cluster, **options)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_a_cluster_send_to_each_other(seed: int) -> None:
    found = sums(SOUND, seed=seed, lazy=seed % 2 == 0)
    threads = np.arange(64)
    for first in (0, 4):
        want = sum(1000 * block + threads for block in range(first, first + 4))
        assert (found[first : first + 4] == want).all()


STAYS = "setp.eq.b32 %p0, %r1, 3; @%p0 bra out;"
MISUSES = {
    "sent before the barrier": (SOUND.replace(ARRIVE + WAIT + SEND, SEND + ARRIVE + WAIT), HazardError),
    "sent between arrival and wait": (SOUND.replace(WAIT + SEND, SEND + WAIT), HazardError),
    "no barrier that counts": (SOUND.replace(OPEN, ""), MachineError),
    "a barrier that counts, made too late": (SOUND.replace(OPEN + ARRIVE, ARRIVE + OPEN), HazardError),
    "sent to memory in use": (SOUND.replace(USED, "").replace(ARRIVE, ARRIVE + USED), HazardError),
    "read before it has come": (SOUND.replace(wait("%r3"), ""), MachineError),
    "an end before all has come": (SOUND.replace(", 1024;", ", 512;"), MachineError),
    "fewer bytes than expected": (SOUND.replace(", 1024;", ", 2048;"), DeadlockError),
    "a barrier that counts, not announced": (
        SOUND.replace("@%p0 fence.mbarrier_init.release.cluster;", ""),
        HazardError,
    ),
    "no fence for the memory": (SOUND.replace(FENCE, ""), HazardError),
    "a fence before the memory was in use": (SOUND.replace(FENCE, "").replace(USED, FENCE + USED), HazardError),
    "two arrivals": (SOUND.replace(ARRIVE, ARRIVE + ARRIVE), HazardError),
    "a wait without an arrival": (SOUND.replace(ARRIVE, ""), HazardError),
    "a block that stays away": (SOUND.replace(ARRIVE, STAYS + ARRIVE) + "out:", DeadlockError),
    "no such block": (SOUND.replace("%r6, 3;", "%r6, 4;"), AccessError),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_every_misuse_is_found(misuse: str) -> None:
    """In every order of the blocks."""
    text, error = MISUSES[misuse]
    assert text != SOUND
    for seed in range(6):
        with pytest.raises(error):
            sums(text, seed=seed)


def test_without_clusters_there_are_none() -> None:
    with pytest.raises(AccessError, match="an instruction for clusters in a launch without them"):
        sums(SOUND, cluster=1)
