"""Clusters: blocks that begin together, send values into each other's shared memory and meet at a barrier.

A block may be sent something once all that its own warps had to do with that memory came before their arrival at the
barrier of the cluster, and the sender has passed it. What is sent arrives late, at once, in any order, and is counted
by a barrier in the memory that it goes to.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import AccessError, DivergenceError, HazardError
from ptx_machine.machine import Barrier, Block, Mask, Operation, Warp
from ptx_machine.parser import Instruction, Operand
from ptx_machine.races import CHUNK, Clock

if TYPE_CHECKING:
    from ptx_machine.memory import Bytes

_WINDOW = 24  # bits of an address within the shared memory of a block; 1 + its rank is above
_SENT = "st.async.shared::cluster.mbarrier::complete_tx::bytes"


class Sent:
    """Values under way to a block."""

    def __init__(self, places: NDArray[np.int64], data: "Bytes", barrier: Barrier) -> None:
        self.places, self.data, self.barrier = places, data, barrier

    def land(self, block: Block) -> None:
        """Arrive."""
        block.shared.receive(self.places, self.data)
        block.shared.races.arrive(self.places // CHUNK, self.barrier.number, self.barrier.phases + 1)
        self.barrier.receive(self.data.size)


class Cluster:
    """Some blocks, by their rank."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.known: list[dict[int, Clock]] = [{} for _ in blocks]  # by those who came to a phase, of each block
        for rank, block in enumerate(blocks):
            block.cluster, block.rank = self, rank

    def arrive(self, warp: Warp) -> None:
        """Arrive at the barrier."""
        if warp.arrivals != warp.waits:
            raise HazardError("a second arrival at the barrier of the cluster without a wait after the first")
        known = self.known[warp.block.rank]
        known[warp.arrivals] = np.maximum(warp.released, known.get(warp.arrivals, warp.released))
        warp.arrivals += 1

    def wait(self, warp: Warp) -> bool:
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

    def send(self, warp: Warp, addresses: NDArray[Any], data: "Bytes", signals: NDArray[Any]) -> None:
        """Send a row of `data` to each address, which the barriers at `signals`, in the same blocks, count."""
        if warp.waits == 0:
            raise HazardError("something is sent to a block before the barrier of the cluster says that it is ready")
        for window in np.unique(addresses >> _WINDOW):
            here = addresses >> _WINDOW == window
            block, known = self.blocks[int(window) - 1], self.known[int(window) - 1][warp.waits - 1]
            if (signals[here] >> _WINDOW != window).any():
                raise AccessError("what is sent to one block is counted by another")
            inside = np.uint32((1 << _WINDOW) - 1)
            signal = block.barriers.get(warp.uniform(signals[here] & inside, "the barrier that counts"))
            if signal is None or known[signal.maker] < signal.made or not signal.announced:
                raise HazardError("something is sent to a block that has not made the barrier for it")
            if all(one.done for one in block.warps):
                raise HazardError("something is sent to a block that has ended")
            places = block.shared.places(addresses[here] & inside, data.shape[1])
            block.shared.expect(places, known, signal.number)
            block.copies.append(Sent(places, data[here], signal))


def of(warp: Warp) -> Cluster:
    """The cluster of a warp's block."""
    if warp.block.cluster is None:
        raise AccessError("an instruction for clusters in a launch without them")
    return warp.block.cluster


def decode_cluster(instruction: Instruction, slot: Callable[[Operand, int], int]) -> Operation | None:
    """Decode the barrier of a cluster, its fences, mapa and st.async, else return None."""
    opcode = instruction.opcode
    if opcode == "fence.release.sync_restrict::shared::cta.cluster":

        def release(warp: Warp, mask: Mask) -> None:
            warp.released = warp.publish([])

        return Operation(release, [], [])
    if opcode == "fence.mbarrier_init.release.cluster":

        def announce(warp: Warp, mask: Mask) -> None:
            for one in warp.block.barriers.values():
                one.announced |= one.maker == warp.index

        return Operation(announce, [], [])
    if opcode in ("barrier.cluster.arrive.relaxed.aligned", "barrier.cluster.wait.acquire.aligned"):
        arrives = "arrive" in opcode

        def meet(warp: Warp, mask: Mask) -> bool | None:
            if mask is not None:
                raise DivergenceError("a barrier of the cluster that only some lanes come to")
            return of(warp).arrive(warp) if arrives else of(warp).wait(warp)

        return Operation(meet, [], [])
    if opcode == "mapa.shared::cluster.u32":
        out, place, rank = (slot(one, 32) for one in instruction.operands)

        def mapped(warp: Warp, mask: Mask) -> None:
            ranks = warp.registers[rank]
            if (ranks >= len(of(warp).blocks)).any():
                raise AccessError(f"a cluster of {len(of(warp).blocks)} blocks has no block {int(ranks.max())}")
            warp.write(out, warp.registers[place] | (ranks + np.uint32(1)) << np.uint32(_WINDOW), mask)

        return Operation(mapped, [place, rank], [out])
    return _decode_send(instruction, slot) if opcode in (f"{_SENT}.v2.f32", f"{_SENT}.f32") else None


def _decode_send(instruction: Instruction, slot: Callable[[Operand, int], int]) -> Operation:
    target, source, signal = instruction.operands
    if target.value or signal.value:
        raise NotImplementedError(instruction.place)
    values = [slot(one, 32) for one in (source.parts if source.kind == "vector" else [source])]
    address, barrier = slot(target.parts[0], 32), slot(signal.parts[0], 32)

    def send(warp: Warp, mask: Mask) -> None:
        data = np.stack([warp.registers[one] for one in values], axis=1).view(np.uint8)
        lanes = slice(None) if mask is None else mask
        of(warp).send(warp, warp.registers[address][lanes], data[lanes], warp.registers[barrier][lanes])

    return Operation(send, [address, barrier, *values], [])
