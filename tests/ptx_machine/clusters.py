"""Clusters: blocks that begin together, read each other's shared memory and wait for each other at one barrier.

What one block stored another may read once both have passed the barrier; what another has read may be stored to, or
end with its block, once both have passed it again. The barrier is counted: a warp's arrivals and its waits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import AccessError, DivergenceError, HazardError
from ptx_machine.memory import Bytes
from ptx_machine.parser import Instruction, Operand
from ptx_machine.races import Clock, unknown

if TYPE_CHECKING:
    from ptx_machine.machine import Block, Mask, Operation, Warp

_WINDOW = 24  # bits of an address within the shared memory of a block; 1 + its rank is above, 0 is a block's own
_NEVER = -1


class Cluster:
    """Some blocks, by their rank."""

    def __init__(self, blocks: list["Block"]) -> None:
        self.blocks = blocks
        self.known: list[dict[int, Clock]] = [{} for _ in blocks]  # by those who came to a phase, of each block
        # the number of arrivals, at the barrier, of the warp that stored each byte last, and of the last one to read it
        self.stored = [np.full(block.shared.data.size, _NEVER, np.int32) for block in blocks]
        self.read = [np.full(block.shared.data.size, _NEVER, np.int32) for block in blocks]
        for rank, block in enumerate(blocks):
            block.cluster, block.rank = self, rank

    def arrive(self, warp: "Warp") -> None:
        """Arrive at the barrier."""
        if warp.arrivals != warp.waits:
            raise HazardError("a second arrival at the barrier of the cluster without a wait after the first")
        known = self.known[warp.block.rank]
        known[warp.arrivals] = warp.publish([known.get(warp.arrivals, unknown(len(warp.block.warps)))])
        warp.arrivals += 1

    def wait(self, warp: "Warp") -> bool:
        """Pass the barrier; whether the warp must wait."""
        if warp.arrivals == warp.waits:
            raise HazardError("a wait at the barrier of the cluster without an arrival")
        phase = warp.waits

        def complete() -> bool:
            return all(one.arrivals > phase for block in self.blocks for one in block.warps)

        if not complete():
            warp.counter -= 1
            warp.waiting = complete
            return True
        warp.waits += 1
        warp.clock = np.maximum(warp.clock, self.known[warp.block.rank][phase])
        return False

    def load(self, warp: "Warp", addresses: NDArray[Any], width: int) -> Bytes:
        """Return `width` bytes at each address, ``[lanes, width]``, of whichever blocks."""
        found = np.zeros((len(addresses), width), np.uint8)
        for window in np.unique(addresses >> _WINDOW):
            rank = warp.block.rank if window == 0 else int(window) - 1
            block = self.blocks[rank]
            here = addresses >> _WINDOW == window
            if all(one.done for one in block.warps):
                raise HazardError("a read of the shared memory of a block that has ended")
            places = block.shared.readable(addresses[here] & ((1 << _WINDOW) - 1), width)
            if (self.stored[rank][places] >= warp.waits).any():
                raise HazardError("a read that no barrier of the cluster orders after the store")
            self.read[rank][places] = np.maximum(self.read[rank][places], warp.arrivals)
            found[here] = block.shared.data[places]
        return found

    def store(self, warp: "Warp", places: NDArray[np.int64]) -> None:
        """Note a store of a warp into its own block's memory."""
        rank = warp.block.rank
        if (self.read[rank][places] >= warp.waits).any():
            raise HazardError("a store that no barrier of the cluster orders after the read of another block")
        self.stored[rank][places] = warp.arrivals

    def end(self, block: "Block") -> None:
        """Check that a block may end: nobody reads its memory any more."""
        if self.read[block.rank].max() >= max(one.waits for one in block.warps):
            raise HazardError("a block ends that no barrier of the cluster orders after the read of another one")


def of(warp: "Warp") -> Cluster:
    """The cluster of a warp's block."""
    if warp.block.cluster is None:
        raise AccessError("an instruction for clusters in a launch without them")
    return warp.block.cluster


def decode_cluster(instruction: Instruction, slot: Callable[[Operand, int], int]) -> "Operation | None":
    """Decode the barrier of a cluster and mapa, else return None."""
    from ptx_machine.machine import Operation

    opcode = instruction.opcode
    if opcode in ("barrier.cluster.arrive.release.aligned", "barrier.cluster.wait.acquire.aligned"):
        arrives = "arrive" in opcode

        def execute(warp: "Warp", mask: "Mask") -> bool | None:
            if mask is not None:
                raise DivergenceError("a barrier of the cluster that only some lanes come to")
            return of(warp).arrive(warp) if arrives else of(warp).wait(warp)

        return Operation(execute, [], [])
    if opcode != "mapa.shared::cluster.u32":
        return None
    out, place, rank = (slot(one, 32) for one in instruction.operands)

    def mapped(warp: "Warp", mask: "Mask") -> None:
        ranks = warp.registers[rank]
        if (ranks >= len(of(warp).blocks)).any():
            raise AccessError(f"a cluster of {len(of(warp).blocks)} blocks has no block {int(ranks.max())}")
        warp.write(out, warp.registers[place] | (ranks + np.uint32(1)) << np.uint32(_WINDOW), mask)

    return Operation(mapped, [place, rank], [out])
