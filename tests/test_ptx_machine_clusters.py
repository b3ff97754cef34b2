"""Clusters of the emulated machine, and every misuse of them that it must find.

Oracle: a sum by numpy; each hazard is a small change of one sound kernel.
"""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_machine import AccessError, DeadlockError, HazardError, UndefinedError
from ptx_snippets import run

pytest.importorskip("triton", reason="the emulator is for kernels written in Triton")

ARRIVE, WAIT = "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"
# Each block puts its number, times 1000, plus the thread's into its memory; each thread adds those of all blocks.
PUT = """ld.param.b64 %w0, [k_param_0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 1000, %r0;
mov.b32 %r3, global_smem; shl.b32 %r4, %r0, 2; add.s32 %r4, %r4, %r3; mov.b32 %r9, 0;
st.shared.b32 [%r4], %r2;
"""
GET = """mov.b32 %r6, RANK; mapa.shared::cluster.u32 %r5, %r4, %r6; ld.shared::cluster.b32 %r7, [%r5];
add.s32 %r9, %r9, %r7;
"""
SUM = "".join(GET.replace("RANK", str(rank)) for rank in range(4))
STORE = "mad.lo.s32 %r8, %r1, 64, %r0; mad.wide.u32 %w1, %r8, 4, %w0; st.global.b32 [%w1], %r9;\n"
SOUND = PUT + ARRIVE + WAIT + SUM + ARRIVE + STORE + WAIT


def sums(text: str, cluster: int = 4, **options: Any) -> NDArray[Any]:
    """What two clusters of blocks of 64 threads store."""
    out = np.zeros((2 * cluster, 64), np.int32)
    run(text, [out], 64, grid=(2,), cluster=cluster, **options)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_a_cluster_read_each_other(seed: int) -> None:
    found = sums(SOUND, seed=seed, lazy=seed % 2 == 0)
    threads = np.arange(64)
    for first in (0, 4):
        want = sum(1000 * block + threads for block in range(first, first + 4))
        assert (found[first : first + 4] == want).all()


AGAIN = PUT.splitlines()[-1]
MISUSES = {
    "a read before the barrier": (SOUND.replace(ARRIVE + WAIT + SUM, SUM + ARRIVE + WAIT), HazardError),
    "a read between arrival and wait": (PUT + ARRIVE + SUM + WAIT + STORE, HazardError),
    "an end while others read": (PUT + ARRIVE + WAIT + SUM + STORE, HazardError),
    "an end after the arrival only": (PUT + ARRIVE + WAIT + SUM + ARRIVE + STORE, HazardError),
    "a store before others have read": (SOUND.replace(SUM, SUM + AGAIN), HazardError),
    "two arrivals": (SOUND.replace(ARRIVE, ARRIVE + ARRIVE, 1), HazardError),
    "a wait without an arrival": (PUT + WAIT + SUM, HazardError),
    "a block that stays away": (PUT + "setp.eq.b32 %p0, %r1, 3; @%p0 bra out;" + ARRIVE + WAIT + "out:", DeadlockError),
    "no such block": (SOUND.replace("%r6, 3;", "%r6, 4;"), AccessError),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_every_misuse_is_found(misuse: str) -> None:
    """In every order of the blocks; one that has not begun has nothing in its memory."""
    text, error = MISUSES[misuse]
    assert text != SOUND
    for seed in range(6):
        with pytest.raises((error, UndefinedError)):
            sums(text, seed=seed)


def test_without_clusters_there_are_none() -> None:
    with pytest.raises(AccessError, match="an instruction for clusters in a launch without them"):
        sums(SOUND, cluster=1)
