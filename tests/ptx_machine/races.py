"""Which accesses to shared memory are ordered: vector clocks of the warps, advanced where they synchronize.

A clock has a column for each warp; one for each barrier in shared memory: how many of its phases are known to be
complete, and so which copies to have arrived; and again one for each warp: up to when its stores are visible to
products and tensor copies, because somebody's fence.proxy.async lies between. As PTX has it, that need not be the fence
of the warp that stored: any one does that is known to be after the store and before the product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import HazardError

Clock = NDArray[np.int32]  # the time up to which what each column stands for is known to have happened
BARRIERS = 32  # at most
CHUNK = 16  # bytes that a swizzle keeps together


def unknown(warps: int) -> Clock:
    """Return a clock that knows of nothing."""
    return np.zeros(warps + BARRIERS + warps, np.int32)


def first(warps: int, own: int) -> Clock:
    """Return the clock of a warp at its beginning: it knows of itself only."""
    clock = unknown(warps)
    clock[own] = 1
    return clock


def fenced(clock: Clock, warps: int, own: int) -> Clock:
    """Return the clock of a warp after its fence.proxy.async: later stores of it have a later time."""
    clock = clock.copy()
    clock[-warps:] = clock[:warps]
    clock[own] += 1
    return clock


class Races:
    """The time of the last access to each byte by each warp, and of the copy that brought each chunk."""

    def __init__(self, size: int, warps: int) -> None:
        self._warps = warps
        self._read = np.zeros((size, warps), np.int32)
        self._written = np.zeros((size, warps), np.int32)
        self._column = np.zeros(size // CHUNK, np.int64)
        self._arrived = np.zeros(size // CHUNK, np.int32)
        self._stored = False  # most kernels store nothing for long, and there is nothing to check

    def _check_copies(self, chunks: NDArray[Any], clock: Clock) -> None:
        if (self._arrived[chunks] > clock[self._column[chunks]]).any():
            raise HazardError("nobody has waited for the copy that brought what is accessed here")

    def read(self, places: NDArray[Any], warp: int, clock: Clock) -> None:
        """Note a read, which all stores and copies must be known to have happened before."""
        self._check_copies(places // CHUNK, clock)
        if self._stored and (self._written[places] > clock[: self._warps]).any():
            raise HazardError("a read that nothing orders after the store of another warp")
        self._read[places, warp] = clock[warp]

    def write(self, places: NDArray[Any], warp: int, clock: Clock, again: NDArray[np.bool_] | None = None) -> None:
        """Note a store, which all accesses must be known to come before, but where it stores `again` what is there."""
        self.replace(places if again is None else places[~again], clock)
        self._written[places, warp] = clock[warp]
        self._stored = True

    def replace(self, places: NDArray[Any], clock: Clock, barrier: int | None = None) -> None:
        """Check a copy into these bytes, as if it were a store; one counted by a barrier follows others of it."""
        chunks = places // CHUNK
        own = None if barrier is None else self._warps + barrier
        self._check_copies(chunks[self._column[chunks] != own], clock)
        if self._stored and (self._written[places] > clock[: self._warps]).any():
            raise HazardError("a write that nothing orders after the store of another warp")
        if (self._read[places] > clock[: self._warps]).any():
            raise HazardError("a write that nothing orders after the read of another warp")

    def unfenced(self, places: NDArray[Any], clock: Clock) -> bool:
        """Whether one of these bytes was stored without a fence between the store and what has this clock."""
        return self._stored and bool((self._written[places] > clock[-self._warps :]).any())

    def forget(self, places: NDArray[Any]) -> None:
        """Note that the stores to these bytes are overwritten."""
        if self._stored:
            self._written[places] = 0

    def arrive(self, chunks: NDArray[Any], barrier: int, phase: int) -> None:
        """Note a copy: whoever accesses what it brought must know that this phase of its barrier is complete."""
        self._column[chunks], self._arrived[chunks] = self._warps + barrier, phase

    def end(self, clocks: Sequence[Clock]) -> None:
        """Check that somebody has waited for each copy."""
        self._check_copies(np.arange(self._arrived.size), np.maximum.reduce(clocks))
