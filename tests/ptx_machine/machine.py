"""Blocks of threads, their warps, and the scheduler that interleaves them at random."""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import DeadlockError, DivergenceError, HazardError, MachineError, UndefinedError
from ptx_machine.memory import Memory, Shared, TensorMap
from ptx_machine.races import Clock, first, unknown

if TYPE_CHECKING:
    from ptx_machine.clusters import Cluster, Sent
    from ptx_machine.copies import Transfer
    from ptx_machine.products import Product

LANES = 32
Mask = NDArray[np.bool_] | None  # None: every lane
Registers = list[Any]  # arrays of 32 lanes, or None where nothing was written
Execute = Callable[["Warp", Mask], bool | None]  # True: the warp cannot go on now
Condition = Callable[[], bool]


class Operation:
    """A decoded instruction: what it does and which registers it touches."""

    __slots__ = ("asynchronous", "execute", "guard", "negated", "place", "touched", "writes")

    def __init__(
        self, execute: Execute, reads: Sequence[int], writes: Sequence[int], asynchronous: bool = False
    ) -> None:
        self.execute = execute
        self.writes = frozenset(writes)
        self.touched = self.writes | frozenset(reads)
        self.asynchronous = asynchronous  # checks its registers itself
        self.guard: int | None = None
        self.negated = False
        self.place = ""


class Barrier:
    """A barrier in shared memory (mbarrier)."""

    def __init__(self, count: int, number: int, maker: "Warp") -> None:
        warps = len(maker.block.warps)
        self.maker, self.made = maker.index, int(maker.clock[maker.index])
        self.count = self.pending = count
        self.bytes = 0
        self.number, self.column = number, warps + number
        self.phases = 0  # complete ones
        self.announced = False  # to other blocks of the cluster, by a fence
        self.clock: Clock = unknown(warps)  # what those who wait here will know

    def arrive(self, bytes_expected: int, arrivals: int) -> None:
        """Arrive, and expect bytes in this phase."""
        if self.pending < arrivals:
            raise HazardError("more arrivals at a barrier than it expects in a phase")
        self.bytes += bytes_expected
        self.pending -= arrivals
        self._complete()

    def receive(self, count: int) -> None:
        """Note that bytes have arrived."""
        self.bytes -= count
        self._complete()

    @property
    def phase(self) -> int:
        """Parity of the phase that is not complete."""
        return self.phases & 1

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phases += 1
            self.clock[self.column] = self.phases
            self.pending = self.count


class Copy:
    """A tensor copy under way."""

    def __init__(self, source: TensorMap, row: int, column: int, chunks: NDArray[np.int64], barrier: Barrier) -> None:
        self.source, self.row, self.column, self.chunks, self.barrier = source, row, column, chunks, barrier

    def land(self, block: "Block") -> None:
        """Arrive."""
        block.shared.end_write(self.chunks, self.source.read(block.memory, self.row, self.column))
        block.shared.races.arrive(self.chunks, self.barrier.number, self.barrier.phases + 1)
        self.barrier.receive(self.source.size)


class Warp:
    """32 lanes that go together."""

    def __init__(self, block: "Block", index: int, registers: Registers) -> None:
        self.block, self.index, self.registers = block, index, registers
        self.clock = first(block.threads // LANES, index)
        self.counter = 0
        self.arrivals = self.waits = 0  # at the barrier of the cluster
        self.released = unknown(block.threads // LANES)  # what a fence has made known to who meets the warp there
        self.done = False
        self.place = ""  # where it waits
        self.waiting: Condition | None = None
        self.begun = not block.waits_for_grid  # whether it may access what kernels before this one write
        self.open: list[Product] = []  # products since the last commit
        self.groups: list[list[Product]] = []  # committed ones
        self.accumulators: set[int] = set()  # registers of products under way
        self.operands: set[int] = set()
        self.filling: list[Transfer] = []  # copies since the last commit; a kernel may end with some
        self.fills: list[list[Transfer]] = []  # committed ones
        self.unfenced: set[int] = set()  # registers written since the last wgmma.fence

    def write(self, slot: int, value: NDArray[Any], mask: Mask) -> None:
        """Write a register, in the lanes of the mask."""
        if mask is not None:
            old = self.registers[slot]
            value = np.where(mask, value, np.zeros_like(value) if old is None else old)
        self.registers[slot] = value

    def publish(self, others: Sequence[Clock]) -> Clock:
        """Return what this warp and others know, and begin a time of which the others do not know."""
        known: Clock = np.maximum.reduce([self.clock, *others])
        self.clock = self.clock.copy()
        self.clock[self.index] += 1
        return known

    def uniform(self, values: NDArray[Any], what: str) -> int:
        """Return the one value that all lanes have."""
        if (values != values[0]).any():
            raise DivergenceError(f"lanes differ in {what}")
        return int(values[0])

    def run(self, steps: int) -> None:
        """Go on for some instructions, or until it must wait."""
        operations = self.block.operations
        for _ in range(steps):
            operation = operations[self.counter]
            try:
                if self._step(operation):
                    self.place = operation.place
                    return
            except MachineError as error:
                raise error.at(f"warp {self.index}, {operation.place}") from None
            except (TypeError, AttributeError) as error:
                unwritten = [slot for slot in operation.touched - operation.writes if self.registers[slot] is None]
                if not unwritten:
                    raise
                names = ", ".join(self.block.names[slot] for slot in unwritten)
                raise UndefinedError(f"nothing has written {names} at {operation.place}") from error

    def _step(self, operation: Operation) -> bool | None:
        if self.accumulators and not operation.asynchronous:
            if not operation.touched.isdisjoint(self.accumulators):
                raise HazardError("an accumulator of a product that has not been waited for is used")
            if not operation.writes.isdisjoint(self.operands):
                raise HazardError("an operand of a product that has not been waited for is overwritten")
        self.counter += 1
        mask: Mask = None
        if operation.guard is not None:
            mask = ~self.registers[operation.guard] if operation.negated else self.registers[operation.guard]
            if not mask.any():
                return None
            if mask.all():
                mask = None
        if not operation.asynchronous:
            self.unfenced |= operation.writes
        return operation.execute(self, mask)


class Block:
    """One block of threads (CTA)."""

    def __init__(
        self, operations: list[Operation], names: list[str], memory: Memory, maps: dict[int, TensorMap],
        threads: int, shared: Shared, rng: random.Random, lazy: bool, waits_for_grid: bool,
    ) -> None:  # fmt: skip
        self.operations, self.names, self.memory, self.maps, self.threads = operations, names, memory, maps, threads
        self.shared, self.rng, self.lazy, self.waits_for_grid = shared, rng, lazy, waits_for_grid
        self.barriers: dict[int, Barrier] = {}
        self.made_barriers = 0
        self.copies: list[Copy | Sent] = []
        self.arrived: dict[int, list[Warp]] = {}  # those that wait at a barrier of the block
        self.passed: dict[int, int] = {}  # how often it has opened
        self.warps: list[Warp] = []
        self.cluster: Cluster | None = None
        self.rank = 0  # in it
        # 0: a copy arrives when nobody can go on without it
        self.landing = rng.choice((0.0, 0.0, 0.1, 0.7))

    def land(self) -> None:
        """Let one copy arrive, any one: they are not ordered."""
        self.copies.pop(self.rng.randrange(len(self.copies))).land(self)

    def arrive(self, warp: Warp, barrier: int, threads: int) -> bool:
        """Let a warp arrive at a barrier of the block; whether it must wait."""
        here = self.arrived.setdefault(barrier, [])
        here.append(warp)
        turn = self.passed.get(barrier, 0)
        if LANES * len(here) == threads:
            known = np.maximum.reduce([one.clock for one in here])
            for one in here:
                one.clock = known.copy()
                one.clock[one.index] += 1
            self.arrived[barrier], self.passed[barrier] = [], turn + 1
            return False
        warp.waiting = lambda: self.passed.get(barrier, 0) > turn
        return True

    def active(self) -> bool:
        """Whether a warp can go on, or a copy will let one."""
        return bool(self.copies) or any(not w.done and (w.waiting is None or w.waiting()) for w in self.warps)

    def turn(self) -> bool:
        """Let one warp go on, any one that can; whether there is more to do."""
        alive = [warp for warp in self.warps if not warp.done]
        if self.copies and self.rng.random() < self.landing:
            self.land()
        ready = [warp for warp in alive if warp.waiting is None or warp.waiting()]
        if ready:
            warp = self.rng.choice(ready)
            warp.waiting = None
            warp.run(int(10 ** self.rng.uniform(0, 3.5)))
        elif self.copies:
            self.land()
        elif alive and self.cluster is not None and any(block.active() for block in self.cluster.blocks):
            return True
        elif alive:
            where = {warp.place for warp in alive}
            raise DeadlockError(f"{len(alive)} warps wait for ever after {', '.join(sorted(where))}")
        if not all(warp.done for warp in self.warps):
            return True
        if self.copies:
            raise HazardError("the kernel ends while copies into its shared memory are under way")
        self.shared.races.end([warp.clock for warp in self.warps])
        return False
