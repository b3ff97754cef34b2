"""Chunks of the dense weight, one after the other in one buffer: how many rows each has, and the kernel that fills it.

A chunk that stays in the GPU's L2 cache between the kernel that writes it and the product that reads it costs no
traffic to memory.
"""

from collections.abc import Iterator
from functools import cache, lru_cache
from math import ceil
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ptq_kernels import tiles
from ptq_kernels.triton import dequant, enqueue, w4a16, workspace
from ptq_kernels.triton.configs import Gpu

USUAL_BYTES = 32 * 2**20  # of a chunk at most, but where a larger one fits and is much faster
_UNUSUAL = 1.1  # times the time, of larger ones
_TILES = ((128, 256, 1.0), (128, 128, 0.55))  # of cuBLAS: rows of x, rows of the weight, time
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@cache
def cache_bytes(device: torch.device) -> int:
    """The L2 cache of a device, 0 of a processor's memory."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


@lru_cache(4096)
def chunk_rows(processors: int, l2_bytes: int, rows: int, n: int, row_bytes: int) -> int:
    """Weight rows of a chunk, a multiple of 128: of those that fit the cache, what `rows` rows multiply soonest.

    A product takes as many waves of tiles as its tiles fill the multiprocessors: one with half a wave too many in each
    chunk takes far longer than the whole weight would. Of equal ones the largest; but more than the usual bytes have to
    be worth it, as x and y want the cache, too.
    """
    most = min(max(l2_bytes, USUAL_BYTES) // row_bytes, tiles.padded(n))
    sizes = range(tiles.ALIGNMENT, most + 1, tiles.ALIGNMENT) or [tiles.ALIGNMENT]
    costs = {}
    for size in sizes:
        unusual = size * row_bytes > USUAL_BYTES
        costs[size] = round(_waves(processors, rows, n, size) * (_UNUSUAL if unusual else 1.0), 6)
    return min(sizes, key=lambda size: (costs[size], -size))


def _waves(processors: int, rows: int, n: int, size: int) -> float:
    """What products of `rows` rows with chunks of so many take, in times of a wave of large tiles."""
    whole, rest = divmod(n, size)
    parts = {size: whole, rest: 1} if rest else {size: whole}
    total = 0.0
    for part, count in parts.items():
        tiled = [(ceil(rows / m) * ceil(part / width), time) for m, width, time in _TILES]
        total += count * min(time * ceil(outputs / processors) for outputs, time in tiled)
    return total


class Dense:
    """The dense weights of one kind of layer, for rows of one dtype."""

    def __init__(self, gpu: Gpu, scheme: dict[str, Any], span: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """`scheme` has the bits and what else is compiled in, as `recipes.constants` takes it."""
        self.gpu, self.shape, self.dtype = gpu, shape, dtype
        columns = shape[1]
        usual = scheme["bits"] == 4 and scheme["scales"] == DTYPES[dtype] != tl.float32 and columns % 2 == 0
        self.kernel = dequant.words_kernel if usual and not w4a16.interpreted() else dequant.dequantize_kernel
        words = self.kernel is dequant.words_kernel
        self.options = {"num_warps": dequant.WARPS_OF_WORDS if words else dequant.WARPS, "enable_fp_fusion": True}
        found = {
            "BITS": scheme["bits"],
            "ORDER": scheme["order"],
            "GROUP": scheme["group"],
            "SCALES": scheme["scales"],
            "ASYM": scheme["asymmetric"],
            "SPAN": span,
            "EVEN_K": columns % dequant.BLOCK_K == 0,
            "BN": dequant.BLOCK_N,
            "BK": dequant.BLOCK_K,
            "USE_ASM": not w4a16.interpreted(),
        }
        self.constants = {name: found[name] for name in self.kernel.arg_names if name in found}
        self.compiled: enqueue.Compiled | None = None

    def chunks(self, qweight: Tensor, rows: int, stream: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, dense rows) a chunk at a time, for products with so many rows of x."""
        outputs, columns = self.shape
        row_bytes = columns * self.dtype.itemsize
        size = chunk_rows(self.gpu.processors, cache_bytes(qweight.device), rows, outputs, row_bytes)
        buffer = torch.empty(size, columns, dtype=self.dtype, device=qweight.device)
        for start in range(0, outputs, size):
            count = min(size, outputs - start)
            self._fill(qweight, buffer, start, tiles.padded(count), stream)
            yield start, buffer[:count]

    def _fill(self, qweight: Tensor, out: Tensor, first_row: int, rows: int, stream: int) -> None:
        """So many rows of out, a multiple of 128: the weight is padded to that."""
        grid = (rows // dequant.BLOCK_N, -(-self.shape[1] // dequant.BLOCK_K), 1)
        tensors, sizes = (qweight, out), (first_row, *self.shape)
        if w4a16.interpreted():
            self.kernel[grid](*tensors, *sizes, **self.constants)
            return
        if self.compiled is None:
            if workspace.capturing(qweight.device):
                raise RuntimeError(
                    f"the kernel that dequantizes a {self.shape[0]} x {self.shape[1]} weight must be compiled before "
                    "a CUDA graph is captured, it is not; call ptq_kernels.warmup, or matmul once with so many rows"
                )
            compiled = self.kernel.warmup(*tensors, *sizes, grid=grid, **self.constants, **self.options)
            self.compiled = enqueue.Compiled(compiled, tuple(self.constants.values()))
        self.compiled(grid, stream, (), tensors, sizes)
