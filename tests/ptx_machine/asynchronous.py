"""Barriers in shared memory, tensor copies, and what orders the warps of a block."""

from collections.abc import Callable

import numpy as np

from ptx_machine.accesses import Slot, address_of, of_grid
from ptx_machine.errors import AccessError, DivergenceError, HazardError, UndefinedError
from ptx_machine.machine import LANES, Barrier, Copy, Execute, Mask, Operation, Warp
from ptx_machine.memory import BARRIER, UNWRITTEN
from ptx_machine.parser import Instruction
from ptx_machine.races import BARRIERS, fenced


def _barrier(warp: Warp, address: int) -> Barrier:
    if address not in warp.block.barriers:
        raise UndefinedError(f"no barrier was made at {address:#x}")
    one = warp.block.barriers[address]
    if warp.clock[one.maker] < one.made:
        raise HazardError(f"nothing orders this after warp {one.maker} made the barrier at {address:#x}")
    return one


def _lanes(mask: Mask) -> list[int]:
    return list(range(LANES)) if mask is None else [int(lane) for lane in np.flatnonzero(mask)]


def _decode_init(instruction: Instruction, slot: Slot) -> Operation:
    address = address_of(instruction.operands[0], 32, slot)
    count = slot(instruction.operands[1], 32)

    def execute(warp: Warp, mask: Mask) -> None:
        for lane in _lanes(mask):
            place = int(address(warp)[lane])
            warp.block.shared.mark(place, 8, BARRIER, warp.index, warp.clock)
            number = warp.block.made_barriers
            warp.block.made_barriers += 1
            if number == BARRIERS:
                raise NotImplementedError(f"more than {BARRIERS} barriers")
            given = int(warp.registers[count][lane])
            warp.block.barriers[place] = Barrier(given, number, warp)

    return Operation(execute, [slot(instruction.operands[0].parts[0], 32), count], [])


def _decode_end(instruction: Instruction, slot: Slot) -> Operation:
    address = address_of(instruction.operands[0], 32, slot)

    def execute(warp: Warp, mask: Mask) -> None:
        for lane in _lanes(mask):
            place = int(address(warp)[lane])
            _barrier(warp, place)
            del warp.block.barriers[place]
            warp.block.shared.mark(place, 8, UNWRITTEN, warp.index, warp.clock)

    return Operation(execute, [slot(instruction.operands[0].parts[0], 32)], [])


def _decode_arrive(instruction: Instruction, slot: Slot) -> Operation:
    target, place, *amount = instruction.operands
    if target.kind != "none":
        raise NotImplementedError(instruction.place)
    expects = "expect_tx" in instruction.opcode
    address = address_of(place, 32, slot)
    given = slot(amount[0], 32) if amount else None

    def execute(warp: Warp, mask: Mask) -> None:
        for lane in _lanes(mask):
            value = 0 if given is None else int(warp.registers[given][lane])
            one = _barrier(warp, int(address(warp)[lane]))
            one.clock = warp.publish([one.clock])
            one.arrive(value if expects else 0, value if given is not None and not expects else 1)

    return Operation(execute, [slot(place.parts[0], 32), *([] if given is None else [given])], [])


def _decode_wait(instruction: Instruction, slot: Slot) -> Operation:
    """Decode try_wait: the warp sleeps until the phase is complete, so it never says no."""
    target, place, parity = instruction.operands[:3]
    out, address, wanted = slot(target, 1), address_of(place, 32, slot), slot(parity, 32)

    def execute(warp: Warp, mask: Mask) -> bool | None:
        if mask is not None:
            raise DivergenceError("a wait of only some lanes")
        one = _barrier(warp, warp.uniform(address(warp), "the barrier they wait at"))
        phase = warp.uniform(warp.registers[wanted], "the parity they wait for") & 1
        if one.phase != phase:
            warp.registers[out] = np.ones(LANES, np.bool_)
            warp.clock = np.maximum(warp.clock, one.clock)
            return None
        warp.counter -= 1
        warp.waiting = lambda: one.phase != phase
        return True

    return Operation(execute, [slot(place.parts[0], 32), wanted], [out])


def _decode_copy(instruction: Instruction, slot: Slot) -> Operation:
    """Decode cp.async.bulk.tensor.2d into shared memory."""
    place, source, signal = instruction.operands[:3]
    words = instruction.opcode.split(".")
    known = {"2d", "tile", "shared::cluster", "shared::cta", "global", "mbarrier::complete_tx::bytes"}
    if words[:4] != ["cp", "async", "bulk", "tensor"] or set(words[4:]) - known or len(instruction.operands) != 3:
        raise NotImplementedError(instruction.place)
    target, tensor, barrier = address_of(place, 32, slot), slot(source.parts[0], 64), address_of(signal, 32, slot)
    column, row = (slot(one, 32) for one in source.parts[1].parts)

    def execute(warp: Warp, mask: Mask) -> None:
        of_grid(warp)
        block = warp.block
        for lane in _lanes(mask):
            name = int(warp.registers[tensor][lane])
            if name not in block.maps:
                raise AccessError(f"there is no tensor map at {name:#x}")
            chunks = block.maps[name].chunks(int(target(warp)[lane]))
            signal_at = int(barrier(warp)[lane])
            one = _barrier(warp, signal_at)
            block.shared.visible(signal_at)
            block.shared.begin_write(chunks, warp.clock)
            x, y = (int(warp.registers[each].view(np.int32)[lane]) for each in (column, row))
            block.copies.append(Copy(block.maps[name], y, x, chunks, one))

    reads = [slot(place.parts[0], 32), tensor, slot(signal.parts[0], 32), column, row]
    return Operation(execute, reads, [])


def _decode_elect(instruction: Instruction, slot: Slot) -> Operation:
    """Decode elect.sync: lane 0."""
    leader, chosen = instruction.operands[0].parts
    outs = [] if leader.kind == "none" else [slot(leader, 32)]
    predicate = slot(chosen, 1)

    def execute(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            raise DivergenceError("an election that only some lanes take part in")
        for out in outs:
            warp.registers[out] = np.zeros(LANES, np.uint32)
        warp.registers[predicate] = np.arange(LANES) == 0

    return Operation(execute, [], [*outs, predicate])


def _decode_block_barrier(instruction: Instruction, slot: Slot) -> Operation:
    numbers = [slot(operand, 32) for operand in instruction.operands]

    def execute(warp: Warp, mask: Mask) -> bool | None:
        if mask is not None:
            raise DivergenceError("a barrier that only some lanes come to")
        values = [warp.uniform(warp.registers[number], "the barrier") for number in numbers]
        return warp.block.arrive(warp, values[0], values[1] if len(values) > 1 else warp.block.threads)

    return Operation(execute, numbers, [])


def _begin(warp: Warp, mask: Mask) -> None:
    warp.begun = True


def _fence(warp: Warp, mask: Mask) -> None:
    warp.block.shared.fence(warp.index)
    warp.clock = fenced(warp.clock, len(warp.block.warps), warp.index)


def _of_lanes(warp: Warp, mask: Mask) -> None:
    """Order the lanes of a warp, which go together here anyway."""
    if mask is not None:
        raise DivergenceError("a barrier of a warp that only some lanes come to")


def _nothing(warp: Warp, mask: Mask) -> None:
    """Order what is ordered here already."""


_DECODERS: dict[str, Callable[[Instruction, Slot], Operation]] = {
    "mbarrier.init": _decode_init, "mbarrier.inval": _decode_end, "mbarrier.arrive": _decode_arrive,
    "mbarrier.try_wait.parity": _decode_wait, "cp.async.bulk.tensor": _decode_copy, "elect.sync": _decode_elect,
    "bar.sync": _decode_block_barrier, "barrier.sync": _decode_block_barrier,
    "barrier.cta.sync": _decode_block_barrier,
}  # fmt: skip
_SIMPLE: dict[str, Execute] = {
    "griddepcontrol.wait": _begin, "griddepcontrol.launch_dependents": _nothing, "fence.proxy.async": _fence,
    "membar": _nothing, "fence.acq_rel": _nothing,
    "fence.sc": _nothing,
    "bar.warp.sync": _of_lanes, "prefetch.tensormap": _nothing, "prefetch.param": _nothing,
}  # fmt: skip


def decode_asynchronous(instruction: Instruction, slot: Slot) -> Operation | None:
    """Decode what this module knows, else return None."""
    for name, decoder in _DECODERS.items():
        if instruction.opcode == name or instruction.opcode.startswith(f"{name}."):
            return decoder(instruction, slot)
    for name, execute in _SIMPLE.items():
        if instruction.opcode == name or instruction.opcode.startswith(f"{name}."):
            return Operation(execute, [], [])
    return None
