"""Loads, stores, atomics, matrices through shared memory, and exchange between lanes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import DivergenceError, HazardError
from ptx_machine.machine import LANES, Mask, Operation, Warp
from ptx_machine.parser import BITS, Instruction, Operand

Slot = Callable[[Operand, int], int]  # slot of an operand of so many bits
Width = Callable[[int], int]  # bits of a register
_HINTS = {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "relaxed", "acquire", "gpu", "sys", "cta", "weak",
          "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_normal", "L2::128B", "L2::64B",
          "L2::256B", "L2::cache_hint"}  # fmt: skip
_SPACES = {"global": 64, "shared": 32, "shared::cta": 32}


def address_of(operand: Operand, bits: int, slot: Slot) -> Callable[[Warp], NDArray[Any]]:
    """Return what computes an address."""
    base, offset = slot(operand.parts[0], bits), operand.value
    dtype = np.uint64 if bits == 64 else np.uint32
    add = dtype(offset % (1 << bits))
    if not offset:
        return lambda warp: warp.registers[base]
    return lambda warp: warp.registers[base] + add


def of_grid(warp: Warp) -> None:
    """Refuse an access before griddepcontrol.wait in a kernel that has one: what it touches may still be written."""
    if not warp.begun:
        raise HazardError("an access to global memory before griddepcontrol.wait")


def _split(opcode: str, place: str) -> tuple[str, int, str]:
    """Space, number of values and type of a load or store."""
    _, *words, kind = opcode.split(".")
    space = next((word for word in words if word in _SPACES), "")
    count = next((int(word[1:]) for word in words if word in ("v2", "v4", "v8")), 1)
    if not space or kind not in BITS or set(words) - _HINTS - {space, f"v{count}"}:
        raise NotImplementedError(place)
    return space, count, kind


def _registers(operand: Operand, bits: int, slot: Slot) -> list[int]:
    return [slot(part, bits) for part in (operand.parts if operand.kind == "vector" else [operand])]


def decode_load(instruction: Instruction, slot: Slot, width: Width) -> Operation:
    """Decode ld.global and ld.shared."""
    space, count, kind = _split(instruction.opcode, instruction.place)
    target, source, *policy = instruction.operands
    each = BITS[kind] // 8
    slots = _registers(target, 8 * each, slot)
    address = address_of(source, _SPACES[space], slot)
    narrow = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{each}")
    wide = [np.dtype(f"u{width(one) // 8}") for one in slots]
    if len(slots) != count or len(policy) != ("L2::cache_hint" in instruction.opcode):
        raise NotImplementedError(instruction.place)

    def execute(warp: Warp, mask: Mask) -> None:
        addresses = address(warp) if mask is None else address(warp)[mask]
        if space == "global":
            of_grid(warp)
            raw = warp.block.memory.load(addresses, each * count)
        else:
            raw = warp.block.shared.load(addresses, each * count, warp.index, warp.clock)
        if mask is not None:
            whole = np.zeros((LANES, each * count), np.uint8)
            whole[mask] = raw
            raw = whole
        values = np.ascontiguousarray(raw).view(narrow)
        for i, one in enumerate(slots):
            warp.write(one, values[:, i].astype(wide[i]), mask)

    return Operation(execute, [slot(one, 64) for one in policy] + [slot(source.parts[0], _SPACES[space])], slots)


def decode_policy(instruction: Instruction, slot: Slot) -> Operation:
    """Decode createpolicy: what a cache may keep changes no result."""
    if not instruction.opcode.startswith("createpolicy.fractional.L2::"):
        raise NotImplementedError(instruction.place)
    out = slot(instruction.operands[0], 64)
    return Operation(lambda warp, mask: warp.write(out, np.zeros(LANES, np.uint64), mask), [], [out])


def decode_store(instruction: Instruction, slot: Slot) -> Operation:
    """Decode st.global and st.shared."""
    space, count, kind = _split(instruction.opcode, instruction.place)
    target, source = instruction.operands
    each = BITS[kind] // 8
    slots = _registers(source, 8 * each, slot)
    address = address_of(target, _SPACES[space], slot)
    narrow = np.dtype(f"u{each}")
    if len(slots) != count:
        raise NotImplementedError(instruction.place)

    def execute(warp: Warp, mask: Mask) -> None:
        data = np.stack([warp.registers[one].astype(narrow) for one in slots], axis=1).view(np.uint8)
        addresses = address(warp)
        if mask is not None:
            data, addresses = data[mask], addresses[mask]
        if space == "global":
            of_grid(warp)
            warp.block.memory.store(addresses, data)
        else:
            warp.block.shared.store(addresses, data, warp.index, warp.clock)

    return Operation(execute, [slot(target.parts[0], _SPACES[space]), *slots], [])


def decode_atomic(instruction: Instruction, slot: Slot) -> Operation:
    """Decode atom.global...add.u32: lane after lane."""
    words = instruction.opcode.split(".")
    target, source, amount = instruction.operands
    if words[1] != "global" or words[-2:] not in (["add", "u32"], ["add", "s32"]):
        raise NotImplementedError(instruction.place)
    out, value, address = slot(target, 32), slot(amount, 32), address_of(source, 64, slot)

    def execute(warp: Warp, mask: Mask) -> None:
        of_grid(warp)
        before = np.zeros(LANES, np.uint32)
        for lane in range(LANES) if mask is None else np.flatnonzero(mask):
            place = address(warp)[lane : lane + 1]
            old = warp.block.memory.load(place, 4).view(np.uint32)[0]
            before[lane] = old[0]
            warp.block.memory.store(place, (old + warp.registers[value][lane]).view(np.uint8)[None])
        warp.write(out, before, mask)

    return Operation(execute, [slot(source.parts[0], 64), value], [out])


def _matrix(instruction: Instruction, mask: Mask) -> None:
    if mask is not None:
        raise DivergenceError("a matrix that only some lanes take part in")


def decode_matrices(instruction: Instruction, slot: Slot) -> Operation:
    """Decode stmatrix and ldmatrix: the rows of matrix i are where the lanes from 8 i on say."""
    words = instruction.opcode.split(".")
    store, transposed = words[0] == "stmatrix", "trans" in words
    target, source = instruction.operands if store else instruction.operands[::-1]
    slots = _registers(source, 32, slot)
    known = {"sync", "aligned", "m8n8", "shared", "shared::cta", "b16", "trans", f"x{len(slots)}"}
    if set(words[1:]) - known or len(slots) not in (1, 2, 4):
        raise NotImplementedError(instruction.place)
    address = address_of(target, 32, slot)

    def execute(warp: Warp, mask: Mask) -> None:
        _matrix(instruction, mask)
        addresses = address(warp)[: 8 * len(slots)]
        if store:
            parts = np.stack([warp.registers[one] for one in slots]).view(np.uint16).reshape(-1, 8, 8)
            rows = parts.transpose(0, 2, 1) if transposed else parts
            data = np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint8)
            warp.block.shared.store(addresses, data, warp.index, warp.clock)
        else:
            found = warp.block.shared.load(addresses, 16, warp.index, warp.clock, unwritten=True)
            read = found.view(np.uint16).reshape(-1, 8, 8)
            rows = read.transpose(0, 2, 1) if transposed else read
            for one, matrix in zip(slots, np.ascontiguousarray(rows).reshape(len(slots), 64), strict=True):
                warp.registers[one] = matrix.view(np.uint32)

    base = slot(target.parts[0], 32)
    return Operation(execute, [base, *slots], []) if store else Operation(execute, [base], slots)


def decode_shuffle(instruction: Instruction, slot: Slot) -> Operation:
    """Decode shfl.sync.idx and .bfly of the whole warp."""
    mode = instruction.opcode.split(".")[2]
    target, *sources = instruction.operands
    both = target.parts if target.kind == "vector" else (target,)
    if mode not in ("idx", "bfly") or len(sources) != 4:
        raise NotImplementedError(instruction.place)
    value, lane, clamp, members = (slot(one, 32) for one in sources)
    outs = [slot(one, bits) for one, bits in zip(both, (32, 1), strict=False)]

    def execute(warp: Warp, mask: Mask) -> None:
        if mask is not None or (warp.registers[members] != 0xFFFFFFFF).any():
            raise DivergenceError("a shuffle that only some lanes take part in")
        own = np.arange(LANES, dtype=np.uint32)
        segment, most = warp.registers[clamp] >> np.uint32(8) & np.uint32(31), warp.registers[clamp] & np.uint32(31)
        last = (own & segment) | (most & ~segment)
        given = warp.registers[lane]
        source = (own & segment) | (given & ~segment & np.uint32(31)) if mode == "idx" else own ^ given
        inside = source <= last
        warp.registers[outs[0]] = warp.registers[value][np.where(inside, source, own)]
        if len(outs) > 1:
            warp.registers[outs[1]] = inside

    return Operation(execute, [value, lane, clamp, members], outs)


def decode_prefetch(instruction: Instruction, slot: Slot) -> Operation:
    """Decode a prefetch, of addresses that must exist; allowed before griddepcontrol.wait."""
    source: Sequence[Operand] = instruction.operands
    address = address_of(source[0], 64, slot)

    def execute(warp: Warp, mask: Mask) -> None:
        warp.block.memory.load(address(warp) if mask is None else address(warp)[mask], 1)

    return Operation(execute, [slot(source[0].parts[0], 64)], [])
