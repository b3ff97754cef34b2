"""Matrix products: of a warp group (wgmma), of which each warp computes its own 16 rows, and of one warp (mma.sync)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import HazardError, UndefinedError
from ptx_machine.machine import Execute, Mask, Operation, Warp
from ptx_machine.memory import BASE, swizzled
from ptx_machine.parser import Instruction, Operand
from ptx_machine.races import CHUNK
from ptx_machine.values import widen

_NAME = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.(bf16|f16)")
_OF_A_WARP = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32")
_WIDTHS = {0: 0, 1: 128, 2: 64, 3: 32}  # of a swizzle, by its code in a descriptor


@dataclass(frozen=True)
class Form:
    """What an instruction says about its product."""

    columns: int
    kind: str  # of the operands
    accumulators: tuple[int, ...]
    operands: tuple[int, ...]
    registers: frozenset[int]  # the accumulators as a set
    sources: frozenset[int]
    signs: tuple[int, int]


def _rows(words: NDArray[np.uint32], kind: str) -> NDArray[np.float32]:
    """A ``[16, 16]`` from its registers ``[4, 32]``, of a warp group's product and of a warp's alike."""
    # a0: row g, columns 2t, 2t+1; a1: row g + 8; a2, a3: columns + 8
    parts = widen(words.reshape(-1).view(np.uint16), kind).reshape(2, 2, 8, 4, 2)  # k half, row half, g, t, e
    return parts.transpose(1, 2, 0, 3, 4).reshape(16, 16)


def _added(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """``a b^T + c`` as tensor cores have it: products of 16 bits are exact, what they add up to is cut, not rounded.

    They cut what is added too, some bits further down; how many is not published.
    """
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    if c is not None:
        exact += c
    nearest = exact.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)


class Product:
    """A product under way."""

    def __init__(self, form: Form, chunks: NDArray[np.int64], adds: bool) -> None:
        self.form, self.chunks, self.adds, self.executed = form, chunks, adds, False

    def execute(self, warp: Warp) -> None:
        """Read the operands, write the accumulators."""
        form, registers = self.form, warp.registers
        a = _rows(np.stack([registers[slot] for slot in form.operands]), form.kind)
        raw = warp.block.shared.data.reshape(-1, CHUNK)[self.chunks].reshape(-1).view(np.uint16)
        b = widen(raw, form.kind).reshape(form.columns, 16)
        c = None
        if self.adds:
            c = np.stack([registers[slot] for slot in form.accumulators]).view(np.float32)
            c = c.reshape(form.columns // 8, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, form.columns)
        d = _added(a * np.float32(form.signs[0]), b * np.float32(form.signs[1]), c)
        # of column 8j + 2t + e and row 8h + g, d[4j + 2h + e] of lane 4g + t
        flat = d.reshape(2, 8, form.columns // 8, 4, 2).transpose(2, 0, 4, 1, 3).reshape(-1, 32)
        bits = np.ascontiguousarray(flat, np.float32).view(np.uint32)
        for slot, row in zip(form.accumulators, bits, strict=True):
            registers[slot] = row
        self.executed = True


@lru_cache(maxsize=4096)
def _chunks(descriptor: int, columns: int) -> NDArray[np.int64]:
    """Chunks of shared memory that hold B, ``[columns * 2]``: 16 values of each column."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = _WIDTHS[descriptor >> 62]
    if descriptor >> 49 & 7 or descriptor >> 14 & 3 or descriptor >> 30 & 3 or descriptor >> 46 & 7:
        raise NotImplementedError(f"descriptor {descriptor:#x} has a base offset or unknown bits")
    column, half = np.arange(columns)[:, None], np.arange(2)
    pitch, across = (width, CHUNK) if width else (CHUNK, leading)
    addresses = start + column // 8 * stride + column % 8 * pitch + half * across
    return (swizzled(addresses, width) // CHUNK - BASE // CHUNK).reshape(-1)


def _slots(operand: Operand) -> tuple[int, ...]:
    return tuple(part.slot for part in operand.parts)


def _refuse_wrong_registers(warp: Warp, form: Form) -> None:
    """What is undefined already when the product is issued."""
    if not warp.unfenced.isdisjoint(form.registers | form.sources):
        names = [warp.block.names[slot] for slot in warp.unfenced & (form.registers | form.sources)]
        raise HazardError(f"no wgmma.fence since {', '.join(sorted(names)[:4])} was written")
    if not form.sources.isdisjoint(warp.accumulators):
        raise HazardError("an operand is an accumulator of a product that has not been waited for")
    if not form.registers.isdisjoint(warp.operands):
        raise HazardError("an accumulator is an operand of a product that has not been waited for")
    if any(warp.registers[slot] is None for slot in form.operands):
        raise UndefinedError("nothing has written an operand of a product")


def decode_product(instruction: Instruction, slot_of: Callable[[Operand, int], int]) -> Operation:
    """Decode wgmma.mma_async with A in registers and B in shared memory, K-major."""
    name = _NAME.fullmatch(instruction.opcode)
    if name is None or name[2] != name[3] or instruction.operands[1].kind != "vector":
        raise NotImplementedError(instruction.place)
    d, a, b, scale, *numbers = instruction.operands
    signs = [part.value for part in numbers]
    if len(signs) not in (2, 3) or any(signs[2:]) or len(d.parts) != int(name[1]) // 2 or len(a.parts) != 4:
        raise NotImplementedError(f"only B that is K-major: {instruction.place}")
    form = Form(
        int(name[1]), name[2], _slots(d), _slots(a), frozenset(_slots(d)), frozenset(_slots(a)), (signs[0], signs[1])
    )
    descriptor = slot_of(b, 64)
    adds = None if scale.kind == "number" else slot_of(scale, 1)
    always = bool(scale.value)

    def execute(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            raise HazardError("a product that only some lanes take part in")
        _refuse_wrong_registers(warp, form)
        chunks = _chunks(warp.uniform(warp.registers[descriptor], "the descriptor"), form.columns)
        add = always if adds is None else bool(warp.uniform(warp.registers[adds], "scale-d"))
        if add and any(warp.registers[slot] is None for slot in form.accumulators):
            raise UndefinedError("nothing has written an accumulator that a product adds to")
        product = Product(form, chunks, add)
        warp.block.shared.begin_read(chunks, warp.index, warp.clock)
        warp.open.append(product)
        warp.accumulators |= form.registers
        warp.operands |= form.sources
        if not warp.block.lazy:
            product.execute(warp)
        else:
            for slot in form.accumulators:  # an accumulator without a value may be added to by the next product
                if warp.registers[slot] is None:
                    warp.registers[slot] = np.zeros(32, np.uint32)

    return Operation(execute, (*form.operands, descriptor), form.accumulators, asynchronous=True)


def decode_product_of_a_warp(instruction: Instruction, slot_of: Callable[[Operand, int], int]) -> Operation:
    """Decode mma.sync, which is done when the instruction is."""
    name = _OF_A_WARP.fullmatch(instruction.opcode)
    if name is None or name[1] != name[2] or any(one.kind != "vector" for one in instruction.operands):
        raise NotImplementedError(instruction.place)
    d, a, b, c = (tuple(slot_of(part, 32) for part in one.parts) for one in instruction.operands)
    kind = name[1]

    def execute(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            raise HazardError("a product that only some lanes take part in")
        rows = _rows(np.stack([warp.registers[slot] for slot in a]), kind)
        # b0: column g, rows 2t, 2t+1; b1: rows + 8
        columns = np.stack([warp.registers[slot] for slot in b]).reshape(-1).view(np.uint16)
        columns = widen(columns, kind).reshape(2, 8, 4, 2).transpose(1, 0, 2, 3).reshape(8, 16)
        # of row 8h + g and column 2t + e, d[2h + e] of lane 4g + t
        added = np.stack([warp.registers[slot] for slot in c]).view(np.float32)
        added = added.reshape(2, 2, 8, 4).transpose(0, 2, 3, 1).reshape(16, 8)
        found = _added(rows, columns, added).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32)
        for slot, row in zip(d, np.ascontiguousarray(found, np.float32).view(np.uint32), strict=True):
            warp.registers[slot] = row

    return Operation(execute, (*a, *b, *c), d)


def _retire(warp: Warp, products: Sequence[Product]) -> None:
    for product in products:
        if not product.executed:
            product.execute(warp)
        warp.block.shared.end_read(product.chunks, warp.index, warp.clock)


def wait(left: int) -> Execute:
    """Return what waits until only so many groups are under way."""

    def execute(warp: Warp, mask: Mask) -> None:
        while len(warp.groups) > left:
            _retire(warp, warp.groups.pop(0))
        rest = [product for group in [*warp.groups, warp.open] for product in group]
        warp.accumulators = set().union(*(product.form.registers for product in rest))
        warp.operands = set().union(*(product.form.sources for product in rest))

    return execute


def commit(warp: Warp, mask: Mask) -> None:
    """Close the group."""
    warp.groups.append(warp.open)
    warp.open = []


def fence(warp: Warp, mask: Mask) -> None:
    """Let products see the registers."""
    warp.unfenced.clear()
