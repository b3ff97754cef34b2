"""Global memory at fake addresses, tensor maps, and the shared memory of one block of threads."""

import bisect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.errors import AccessError, HazardError, UndefinedError
from ptx_machine.races import CHUNK, Clock, Races

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.uint64]
_FIRST, _GAP, _ALIGNMENT = 0x7F00_0000_0000, 1 << 24, 256
BASE = 1024  # where shared memory begins, as on the hardware, so that 0 is no address of it
UNWRITTEN, WRITTEN, ARRIVING, BARRIER = range(4)  # of a byte of shared memory


class Memory:
    """Buffers far apart, so that an address just outside one is in none."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[Bytes] = []

    def add(self, array: NDArray[Any]) -> int:
        """Give an array an address. Stores modify the array in place."""
        if not array.flags.c_contiguous:
            raise ValueError("a buffer must be contiguous")
        start = _FIRST if not self._starts else self._starts[-1] + self._buffers[-1].size + _GAP
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        self._starts.append(start)
        self._buffers.append(array.reshape(-1).view(np.uint8))
        return start

    def find(self, first: int, last: int, width: int) -> tuple[Bytes, int]:
        """Return the buffer that holds all bytes from `first` to `last` + `width`, and its address."""
        index = bisect.bisect_right(self._starts, first) - 1
        if index < 0 or last + width > self._starts[index] + self._buffers[index].size:
            raise AccessError(f"{width} bytes at {first:#x} or {last:#x} are outside of every buffer")
        return self._buffers[index], self._starts[index]

    def _places(self, addresses: Addresses, width: int) -> tuple[Bytes, NDArray[np.int64]]:
        first, last = int(addresses.min()), int(addresses.max())
        if (addresses % width).any():
            raise AccessError(f"an address from {first:#x} on is not aligned to {width}")
        buffer, start = self.find(first, last, width)
        return buffer, (addresses - np.uint64(start)).astype(np.int64)[:, None] + np.arange(width)

    def load(self, addresses: Addresses, width: int) -> Bytes:
        """Return `width` bytes at each address, ``[lanes, width]``."""
        buffer, places = self._places(addresses, width)
        return buffer[places]

    def store(self, addresses: Addresses, data: Bytes) -> None:
        """Store a row of `data` at each address."""
        buffer, places = self._places(addresses, data.shape[1])
        buffer[places] = data


class TensorMap:
    """What a CUtensorMap says: a matrix in memory, and how a box of it lies in shared memory."""

    def __init__(
        self, address: int, shape: tuple[int, int], stride: int, box: tuple[int, int], element: int, swizzle: int = 0
    ) -> None:
        """Take shape and box as (rows, columns) in elements, and stride (of a row), element and swizzle in bytes."""
        inner = box[1] * element
        wrong = (
            address % 16 or stride % 16 or inner % 16 or max(box) > 256 or min(box) < 1 or min(shape) < 1
            or swizzle not in (0, 32, 64, 128) or (swizzle and inner > swizzle) or stride < shape[1] * element
        )  # fmt: skip
        if wrong:
            raise ValueError("the hardware has no such tensor map")
        self.address, self.shape, self.stride, self.box = address, shape, stride, box
        self.element, self.swizzle = element, swizzle
        self.size = box[0] * inner

    def read(self, memory: Memory, row: int, column: int) -> Bytes:
        """Return a box, ``[rows, bytes]``; what lies outside of the matrix is zero."""
        box = np.zeros((self.box[0], self.box[1] * self.element), np.uint8)
        rows = range(max(row, 0), min(row + self.box[0], self.shape[0]))
        columns = range(max(column, 0), min(column + self.box[1], self.shape[1]))
        if rows and columns:
            width = len(columns) * self.element
            first = self.address + rows.start * self.stride + columns.start * self.element
            buffer, start = memory.find(first, first + (len(rows) - 1) * self.stride, width)
            places = first - start + (np.arange(len(rows)) * self.stride)[:, None] + np.arange(width)
            left = (columns.start - column) * self.element
            box[rows.start - row : rows.stop - row, left : left + width] = buffer[places]
        return box

    def chunks(self, address: int) -> NDArray[np.int64]:
        """Return where in shared memory the chunks of a box go, ``[rows * chunks of a row]``."""
        if address % 128:
            raise AccessError(f"a tensor copy to {address:#x}, which is not aligned to 128")
        return swizzled(address + CHUNK * np.arange(self.size // CHUNK), self.swizzle) // CHUNK - BASE // CHUNK


def swizzled(addresses: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Exchange chunks within lines of `width` bytes: address bits from 4 on are xored with those from 7 on."""
    keep = max(width // CHUNK - 1, 0)
    return addresses ^ ((addresses >> 7 & keep) << 4)


def _bytes(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    places: NDArray[np.int64] = chunks[:, None] * CHUNK + np.arange(CHUNK)
    return places


class Shared:
    """Shared memory of a block: each byte has a state, each chunk the number of products that still read it."""

    def __init__(self, size: int, warps: int, seed: int) -> None:
        whole = -(-size // CHUNK) * CHUNK
        self.size = size
        self.data = np.random.default_rng(seed).integers(0, 256, whole, dtype=np.uint8)
        self.state = np.zeros(whole, np.uint8)
        self.unfenced = np.zeros(whole, np.uint8)  # 1 + the warp that made a barrier which copies may not see yet
        self.readers = np.zeros(whole // CHUNK, np.int16)
        self.races = Races(whole, warps)

    def places(self, addresses: NDArray[np.uint32], width: int) -> NDArray[np.int64]:
        """Return where in `data` the bytes at some addresses are, ``[lanes, width]``."""
        offsets = addresses.astype(np.int64) - BASE
        if offsets.min() < 0 or offsets.max() + width > self.size:
            raise AccessError(f"shared address {int(addresses.max()):#x} is outside of {self.size} bytes")
        if (offsets % width).any():
            raise AccessError(f"a shared address is not aligned to {width}")
        places: NDArray[np.int64] = offsets[:, None] + np.arange(width)
        return places

    def load(
        self, addresses: NDArray[np.uint32], width: int, warp: int, clock: Clock, unwritten: bool = False
    ) -> Bytes:
        """Return `width` bytes at each address, ``[lanes, width]``; of `unwritten` ones, where allowed, NaN.

        Rows of a matrix that nobody needs may never have been written.
        """
        places = self.places(addresses, width)
        state = self.state[places]
        self._readable(state[state != UNWRITTEN] if unwritten else state)
        self.races.read(places, warp, clock)
        return np.where(state == WRITTEN, self.data[places], np.uint8(0xFF))

    def store(self, addresses: NDArray[np.uint32], data: Bytes, warp: int, clock: Clock) -> None:
        """Store a row of `data` at each address."""
        places = self.places(addresses, data.shape[1])
        if (self.state[places] >= ARRIVING).any():
            raise HazardError("a store to shared memory that a copy under way writes, or to a barrier")
        if self.readers[places // CHUNK].any():
            raise HazardError("a store to shared memory that a product under way reads")
        # a value that all threads have is stored by several warps, in no order: the result is the same
        again = (self.state[places] == WRITTEN) & (self.data[places] == data)
        self.races.write(places, warp, clock, again)
        self.data[places], self.state[places], self.unfenced[places] = data, WRITTEN, 0

    def expect(self, places: NDArray[np.int64], clock: Clock, barrier: int) -> None:
        """Note that what another block has sent, and a barrier counts, arrives at these places from now on."""
        if self.readers[places // CHUNK].any():
            raise HazardError("something is sent to where a product under way reads")
        if (self.state[places] >= ARRIVING).any():
            raise HazardError("something is sent to where a copy under way writes, or to a barrier")
        self.races.replace(places, clock, barrier)
        self.races.forget(places)
        self.state[places] = ARRIVING

    def receive(self, places: NDArray[np.int64], data: Bytes) -> None:
        """Let what was sent arrive."""
        self.data[places], self.state[places] = data, WRITTEN

    def _readable(self, state: Bytes) -> None:
        if (state != WRITTEN).any():
            if (state == ARRIVING).any():
                raise HazardError("a read of shared memory that a copy under way writes")
            raise UndefinedError("a read of shared memory that nothing has written")

    def _inside(self, chunks: NDArray[np.int64]) -> None:
        if chunks.min() < 0 or chunks.max() >= self.readers.size:
            raise AccessError(f"an asynchronous access outside of {self.size} bytes of shared memory")

    def begin_read(self, chunks: NDArray[np.int64], warp: int, clock: Clock) -> None:
        """Note that a product reads these chunks from now on."""
        self._inside(chunks)
        self._readable(self.state.reshape(-1, CHUNK)[chunks])
        if self.races.unfenced(_bytes(chunks), clock):
            raise HazardError("a product reads what a store wrote, without fence.proxy.async after the store")
        self.races.read(_bytes(chunks), warp, clock)
        np.add.at(self.readers, chunks, 1)

    def end_read(self, chunks: NDArray[np.int64], warp: int, clock: Clock) -> None:
        """Note that a product has read these chunks."""
        self.races.read(_bytes(chunks), warp, clock)
        np.subtract.at(self.readers, chunks, 1)

    def begin_write(self, chunks: NDArray[np.int64], clock: Clock) -> None:
        """Note that a copy writes these chunks from now on."""
        self._inside(chunks)
        if self.readers[chunks].any():
            raise HazardError("a copy into shared memory that a product under way reads")
        state = self.state.reshape(-1, CHUNK)
        if (state[chunks] >= ARRIVING).any():
            raise HazardError("a copy into shared memory that another copy under way writes, or into a barrier")
        if self.unfenced.reshape(-1, CHUNK)[chunks].any() or self.races.unfenced(_bytes(chunks), clock):
            raise HazardError("a copy into what a store wrote, without fence.proxy.async after the store")
        self.races.replace(_bytes(chunks), clock)
        self.races.forget(_bytes(chunks))
        state[chunks] = ARRIVING

    def end_write(self, chunks: NDArray[np.int64], data: Bytes) -> None:
        """Let the data of a copy arrive."""
        self.data.reshape(-1, CHUNK)[chunks] = data.reshape(-1, CHUNK)
        self.state.reshape(-1, CHUNK)[chunks] = WRITTEN

    def begin_fill(self, addresses: NDArray[np.uint32], width: int, clock: Clock) -> NDArray[np.int64]:
        """Note that a copy by lanes writes `width` bytes at each address from now on; returns where."""
        places = self.places(addresses, width)
        if self.readers[places // CHUNK].any():
            raise HazardError("a copy into shared memory that a product under way reads")
        if (self.state[places] >= ARRIVING).any() or np.unique(addresses).size < addresses.size:
            raise HazardError("a copy into shared memory that another copy under way writes, or into a barrier")
        self.races.replace(places, clock)
        self.state[places] = ARRIVING
        return places

    def end_fill(self, places: NDArray[np.int64], data: Bytes, warp: int, clock: Clock) -> None:
        """Let the data of a copy by lanes arrive, as if this warp had stored it now."""
        self.races.write(places, warp, clock)
        self.data[places], self.state[places], self.unfenced[places] = data, WRITTEN, 0

    def fence(self, warp: int) -> None:
        """Let copies see the barriers that a warp has made."""
        self.unfenced[self.unfenced == warp + 1] = 0

    def mark(self, address: int, size: int, state: int, warp: int, clock: Clock) -> None:
        """Make bytes those of a barrier, or ordinary ones again."""
        place = self.places(np.array([address], np.uint32), size)
        if (self.state[place] == ARRIVING).any() or self.readers[place // CHUNK].any():
            raise HazardError("a barrier where a copy under way writes or a product reads")
        self.races.replace(place, clock)
        self.state[place], self.unfenced[place] = state, warp + 1

    def visible(self, barrier: int) -> None:
        """Check that a copy sees the barrier that it is to signal."""
        if self.unfenced[barrier - BASE]:
            raise HazardError("a copy to a barrier without a fence.proxy.async after it was made")
