"""Copies by the lanes of a warp (cp.async): what is under way, its groups, and the wait that lets it land.

The bytes may land at any moment from the copy on; nobody may touch them before the warp has waited for their group.
Whoever waits sees them as if it had stored them then, with ordinary stores, not as a tensor copy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.accesses import Slot, address_of, of_grid
from ptx_machine.errors import AccessError, DivergenceError, MachineError
from ptx_machine.machine import Mask, Operation, Warp
from ptx_machine.memory import Memory
from ptx_machine.parser import Instruction

_HINTS = {"L2::64B", "L2::128B", "L2::256B", "L2::cache_hint"}
_WIDTHS = {"ca": (4, 8, 16), "cg": (16,)}  # bytes of a lane


class Transfer:
    """What the lanes of a warp copy with one instruction."""

    def __init__(self, sources: NDArray[Any], sizes: NDArray[Any], places: NDArray[np.int64]) -> None:
        self.sources, self.sizes, self.places = sources, sizes, places
        self.data: NDArray[np.uint8] | None = None  # once it is read

    def read(self, memory: Memory) -> NDArray[np.uint8]:
        """Read the source: so many bytes for each lane, zeros behind them. Of nothing, the address may be any."""
        width = self.places.shape[1]
        if (self.sizes == width).all():
            return memory.load(self.sources, width)
        data = np.zeros(self.places.shape, np.uint8)
        for size in np.unique(self.sizes):
            lanes = self.sizes == size
            if size:
                every = self.sources[lanes][:, None] + np.arange(size, dtype=np.uint64)
                data[lanes, :size] = memory.load(every.reshape(-1), 1).reshape(-1, int(size))
        return data

    def land(self, warp: Warp) -> None:
        """Let the bytes arrive in shared memory."""
        data = self.read(warp.block.memory) if self.data is None else self.data
        warp.block.shared.end_fill(self.places, data, warp.index, warp.clock)


def _decode_copy(instruction: Instruction, slot: Slot) -> Operation:
    """Decode cp.async.ca and .cg, whole or with the number of bytes that are read."""
    _, _, cache, *words = instruction.opcode.split(".")
    target, source, width_given, *rest = instruction.operands
    width = width_given.value
    known = words[:2] in (["shared", "global"], ["shared::cta", "global"]) and not set(words[2:]) - _HINTS
    hinted = "L2::cache_hint" in words  # what a cache may keep changes no result
    known = known and (not hinted or len(rest) == 2)
    rest = rest[:-1] if hinted else rest
    if not known or width not in _WIDTHS.get(cache, ()) or width_given.kind != "number" or len(rest) > 1:
        raise NotImplementedError(instruction.place)
    to, of = address_of(target, 32, slot), address_of(source, 64, slot)
    count = slot(rest[0] if rest else width_given, 32)

    def execute(warp: Warp, mask: Mask) -> None:
        of_grid(warp)
        counts = warp.registers[count]
        if counts.dtype != np.uint32:
            raise NotImplementedError(f"a predicate that ignores the source: {instruction.place}")
        sources, places, sizes = of(warp), to(warp), counts
        if mask is not None:
            sources, places, sizes = sources[mask], places[mask], sizes[mask]
        if (sources % width).any():
            raise AccessError(f"the source of a copy is not aligned to {width}")
        if (sizes > width).any():
            raise MachineError(f"a copy of {width} bytes is to read {sizes.max()}")
        one = Transfer(sources, sizes, warp.block.shared.begin_fill(places, width, warp.clock))
        if not warp.block.lazy:
            one.data = one.read(warp.block.memory)
        warp.filling.append(one)

    return Operation(execute, [slot(target.parts[0], 32), slot(source.parts[0], 64), count], [])


def _whole(mask: Mask) -> None:
    if mask is not None:
        raise DivergenceError("groups of copies that only some lanes close or wait for")


def _decode_commit(instruction: Instruction, slot: Slot) -> Operation:
    def execute(warp: Warp, mask: Mask) -> None:
        _whole(mask)
        warp.fills.append(warp.filling)
        warp.filling = []

    return Operation(execute, [], [])


def _decode_wait(instruction: Instruction, slot: Slot) -> Operation:
    """Decode wait_group, until only so many groups are under way, and wait_all, which needs no group."""
    left = instruction.operands[0].value if instruction.operands else None

    def execute(warp: Warp, mask: Mask) -> None:
        _whole(mask)
        if left is None:
            warp.fills.append(warp.filling)
            warp.filling = []
        while len(warp.fills) > (left or 0):
            for one in warp.fills.pop(0):
                one.land(warp)

    return Operation(execute, [], [])


_DECODERS: dict[str, Callable[[Instruction, Slot], Operation]] = {
    "commit_group": _decode_commit, "wait_group": _decode_wait, "wait_all": _decode_wait,
    **dict.fromkeys(_WIDTHS, _decode_copy),
}  # fmt: skip


def decode_copies(instruction: Instruction, slot: Slot) -> Operation | None:
    """Decode cp.async of lanes, else return None."""
    words = instruction.opcode.split(".")
    found = _DECODERS.get(words[2]) if words[:2] == ["cp", "async"] and len(words) > 2 else None
    return found(instruction, slot) if found else None
