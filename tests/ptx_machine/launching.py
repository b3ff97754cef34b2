"""Decodes a program once and runs the blocks of a grid one after the other, in an order that the seed decides."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_machine import accesses, products
from ptx_machine.arithmetic import TYPES, Computation, computation
from ptx_machine.asynchronous import decode_asynchronous
from ptx_machine.clusters import Cluster, decode_cluster
from ptx_machine.copies import decode_copies
from ptx_machine.errors import DeadlockError, DivergenceError, HazardError
from ptx_machine.machine import LANES, Block, Mask, Operation, Registers, Warp
from ptx_machine.memory import BASE, Memory, Shared, TensorMap
from ptx_machine.parser import Instruction, Operand, Program

_MAPS = 0x7E00_0000_0000  # where the parameters lie that cvta.param makes addresses of; before it they have 32 bits
_STORED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # dtype of a register, by its bits
_MOST_TURNS = 1_000_000  # of warps: blocks that wait for each other in a loop have no other end
_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x", "%laneid",
            "%warpid")  # fmt: skip


class _Decoder:
    """Makes operations of instructions; constants become slots beyond the registers."""

    def __init__(self, program: Program, params: dict[str, int]) -> None:
        self.program, self.params = program, params
        self.constants: Registers = []
        self.special = {name: len(program.widths) + i for i, name in enumerate(_SPECIAL)}
        self.names = [*program.names, *_SPECIAL]
        self._known: dict[tuple[int, int], int] = {}

    def constant(self, value: int, bits: int) -> int:
        """Return the slot of a constant."""
        key = (value % (1 << bits) if bits > 1 else int(bool(value)), bits)
        if key not in self._known:
            self._known[key] = len(self.names)
            self.names.append(str(value))
            self.constants.append(np.full(LANES, key[0], _STORED[bits]))
        return self._known[key]

    def slot(self, operand: Operand, bits: int) -> int:
        """Return the slot of an operand."""
        if operand.kind == "register":
            return operand.slot
        if operand.kind == "number":
            return self.constant(operand.value, bits)
        if operand.name in self.special:
            return self.special[operand.name]
        if operand.name in self.program.shared_symbols:
            return self.constant(BASE, bits)
        if operand.name in self.params:
            return self.constant(self.params[operand.name], bits)
        raise NotImplementedError(f"operand {operand}")

    def width(self, slot: int) -> int:
        """Return the bits of a register."""
        return self.program.widths[slot]

    def decode(self, instruction: Instruction) -> Operation:
        """Decode one instruction."""
        operation = self._decode(instruction)
        operation.place = instruction.place
        operation.guard, operation.negated = instruction.guard, instruction.negated
        if instruction.guard is not None:
            operation.touched |= {instruction.guard}
        return operation

    def _decode(self, instruction: Instruction) -> Operation:
        opcode = instruction.opcode
        name = opcode.split(".")[0]
        if name in ("bra", "ret", "exit"):
            return _branch(instruction) if name == "bra" else Operation(_end, [], [])
        if opcode.startswith("cvta.param"):
            return self._computed(instruction, Computation(lambda a: a + np.uint64(_MAPS), ("u64",), "u64"))
        if name in ("mov", "cvta") or opcode.startswith("ld.param"):
            return self._moved(instruction)
        if name == "ld":
            return accesses.decode_load(instruction, self.slot, self.width)
        one_of = {"st": accesses.decode_store, "atom": accesses.decode_atomic, "stmatrix": accesses.decode_matrices,
                  "ldmatrix": accesses.decode_matrices, "shfl": accesses.decode_shuffle,
                  "createpolicy": accesses.decode_policy, "mma": products.decode_product_of_a_warp}  # fmt: skip
        if name in one_of and not opcode.startswith("st.async"):
            return one_of[name](instruction, self.slot)
        if opcode.startswith("prefetch.global"):
            return accesses.decode_prefetch(instruction, self.slot)
        if name == "wgmma":
            return self._product(instruction)
        found = computation(opcode)
        if found is not None:
            return self._computed(instruction, found)
        one_of_these = (decode_copies, decode_asynchronous, decode_cluster)
        operation = next(filter(None, (decode(instruction, self.slot) for decode in one_of_these)), None)
        if operation is None:
            raise NotImplementedError(instruction.place)
        return operation

    def _product(self, instruction: Instruction) -> Operation:
        kind = instruction.opcode.split(".")[1]
        if kind == "mma_async":
            return products.decode_product(instruction, self.slot)
        waits = kind == "wait_group"
        execute = products.wait(instruction.operands[0].value) if waits else getattr(
            products, {"fence": "fence", "commit_group": "commit"}[kind]
        )  # fmt: skip
        return Operation(_together(execute), [], [])

    def _moved(self, instruction: Instruction) -> Operation:
        target, source = instruction.operands
        if source.kind == "address":  # ld.param
            source = source.parts[0]
        targets = target.parts if target.kind == "vector" else (target,)
        kept = [i for i, one in enumerate(targets) if one.kind != "none"]  # `_` takes what nobody wants
        outs = [targets[i].slot for i in kept]
        bits = self.width(outs[0])
        parts = source.parts if source.kind == "vector" else (source,)
        whole = {"16": 16, "32": 32, "64": 64}.get(instruction.opcode[-2:], bits)
        ins = [self.slot(one, whole // len(parts)) for one in parts]
        part = _STORED[whole // len(targets)]
        if len(targets) == len(ins) == 1:

            def execute(warp: Warp, mask: Mask) -> None:
                warp.write(outs[0], warp.registers[ins[0]], mask)

            return Operation(execute, ins, outs)

        unwritten: Any = np.full(LANES, -1, np.int64).astype(_STORED[whole // len(parts)])

        def repack(warp: Warp, mask: Mask) -> None:
            # A half that nobody reads may never have been written; should it be read after all, it is a NaN.
            found = [warp.registers[one] if warp.registers[one] is not None else unwritten for one in ins]
            values: Any = np.stack(found, axis=1).view(part)
            for i, out in zip(kept, outs, strict=True):
                warp.write(out, values[:, i], mask)

        return Operation(repack, ins, outs)

    def _computed(self, instruction: Instruction, found: Computation) -> Operation:
        target, *sources = instruction.operands
        if len(sources) != len(found.operands) or target.kind != "register":
            raise NotImplementedError(instruction.place)
        dtypes = [np.dtype(TYPES[kind]) for kind in found.operands]
        ins = [self.slot(one, 1 if d == np.bool_ else 8 * d.itemsize) for one, d in zip(sources, dtypes, strict=True)]
        stored = [np.dtype(_STORED[self.width(one)]) if one < len(self.program.widths) else None for one in ins]
        cut = [have is not None and have.itemsize > want.itemsize for have, want in zip(stored, dtypes, strict=True)]
        out, function = target.slot, found.function
        result, kept = np.dtype(TYPES[found.result]), np.dtype(_STORED[self.width(target.slot)])
        grows = result.itemsize < kept.itemsize

        def execute(warp: Warp, mask: Mask) -> None:
            registers = warp.registers
            value = function(*[
                registers[one].astype(f"u{dtype.itemsize}").view(dtype) if narrow else registers[one].view(dtype)
                for one, dtype, narrow in zip(ins, dtypes, cut, strict=True)
            ])  # fmt: skip
            value = value.astype(kept) if grows else value.view(kept)
            warp.write(out, value, mask)

        return Operation(execute, ins, [out])


def _together(execute: Any) -> Any:
    def checked(warp: Warp, mask: Mask) -> Any:
        if mask is not None:
            raise DivergenceError("a warp-wide instruction that only some lanes take part in")
        return execute(warp, mask)

    return checked


def _branch(instruction: Instruction) -> Operation:
    def execute(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            raise DivergenceError("a branch that only some lanes take")
        warp.counter = instruction.target

    return Operation(execute, [], [])


def _end(warp: Warp, mask: Mask) -> bool:
    if mask is not None:
        raise DivergenceError("an end of only some lanes")
    if any(warp.groups) or warp.open:
        raise HazardError("a warp ends while products of it are under way")
    warp.done = True
    return True


def _params(program: Program, params: Sequence[int | TensorMap]) -> tuple[dict[str, int], dict[int, TensorMap]]:
    """Values of parameters by their names, and tensor maps by their addresses."""
    values: dict[str, int] = {}
    maps: dict[int, TensorMap] = {}
    if len(params) != len(program.params):
        raise ValueError(f"the kernel has {len(program.params)} parameters, not {len(params)}")
    for i, ((name, kind, _), value) in enumerate(zip(program.params, params, strict=True)):
        if isinstance(value, TensorMap) != (kind == "tensormap"):
            raise ValueError(f"{name} is a {kind}")
        if isinstance(value, TensorMap):
            maps[_MAPS + 128 * i] = value
        values[name] = 128 * i if isinstance(value, TensorMap) else int(value)
    return values, maps


def launch(
    program: Program, grid: tuple[int, ...], params: Sequence[int | TensorMap], memory: Memory, shared_bytes: int,
    seed: int = 0, lazy: bool = True, cluster: int = 1,
) -> None:  # fmt: skip
    """Run a kernel, a grid of clusters of so many blocks, side by side.

    The seed decides all that the hardware leaves open; `lazy` products run as late as allowed.
    """
    values, maps = _params(program, params)
    decoder = _Decoder(program, values)
    operations = [decoder.decode(instruction) for instruction in program.instructions]
    waits = any(instruction.opcode == "griddepcontrol.wait" for instruction in program.instructions)
    rng = random.Random(seed)
    sizes = (cluster * grid[0], *grid[1:], 1, 1)[:3]
    places = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
    blocks: list[Block] = []
    for place in places:
        shared = Shared(shared_bytes, program.threads // LANES, rng.getrandbits(32))
        block = Block(operations, decoder.names, memory, maps, program.threads, shared, rng, lazy, waits_for_grid=waits)
        for warp in range(program.threads // LANES):
            ids = np.arange(LANES, dtype=np.uint32)
            special = [ids + np.uint32(LANES * warp)]
            special += [np.full(LANES, x, np.uint32) for x in (*place, *sizes, program.threads)]
            special += [ids, np.full(LANES, warp, np.uint32)]
            registers = [*[None] * len(program.widths), *special, *decoder.constants]
            block.warps.append(Warp(block, warp, registers))
        blocks.append(block)
    if cluster > 1:
        for first in range(0, len(blocks), cluster):
            Cluster(blocks[first : first + cluster])
    _run(blocks, rng)


def _run(blocks: list[Block], rng: random.Random) -> None:
    """Run blocks beside each other: one may wait for what another writes."""
    turns = 0
    with np.errstate(all="ignore"):
        while blocks:
            block = rng.choice(blocks)
            for _ in range(rng.randrange(1, 100)):
                turns += 1
                if not block.turn():
                    blocks.remove(block)
                    break
            if turns > _MOST_TURNS:
                raise DeadlockError(f"{len(blocks)} blocks had no end after {turns} turns of their warps")
