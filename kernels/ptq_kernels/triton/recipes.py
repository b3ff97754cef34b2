"""Which kernel a tile is made for, what is compiled into it, and what the copy engine is told of its tensors."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ptq_kernels.triton import ahead
from ptq_kernels.triton.configs import CLUSTERS, Gpu, Tile
from ptq_kernels.triton.tiled import tiled_kernel
from ptq_kernels.triton.wide import wide_kernel


@cache
def _gluon() -> bool:
    """Whether this Triton has the language of explicit kernels, an experimental part of it, as they use it."""
    try:
        from ptq_kernels.triton import pipelined, slim  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def explicit(gpu: Gpu, columns: int) -> bool:
    """Whether kernels written in Gluon run: Hopper's instructions, and rows of x of whole 16 bytes to copy."""
    return gpu.capability // 10 == 9 and columns % 8 == 0 and _gluon()


def kernel_of(tile: Tile) -> Any:
    """The kernel that a tile is made for; the exact and the folded one take the same arguments."""
    if tile.kind == "pipelined":
        from ptq_kernels.triton.pipelined import pipelined_kernel

        return pipelined_kernel
    if tile.kind == "slim":
        from ptq_kernels.triton.slim import slim_kernel

        return slim_kernel
    return wide_kernel if tile.kind == "folded" else tiled_kernel


def cluster(gpu: Gpu, tile: Tile, splits: int) -> int:
    """How many programs of a launch are a cluster (clusters.py); 1: none, as of exact tiles, which were timed so."""
    if tile.kind == "pipelined":
        return splits
    alone = tile.kind in ("exact", "slim")  # slim ones are never split
    return splits if not alone and splits in CLUSTERS and gpu.capability // 10 == 9 else 1


def begins_early(gpu: Gpu) -> bool:
    """Whether a kernel can begin before the one before it has ended."""
    return gpu.capability >= ahead.LEAST_CAPABILITY


def options(tile: Tile, early: bool) -> dict[str, Any]:
    """The options of Triton for a tile whose kernel may begin early."""
    # Fusing is for the accumulator's multiply-add: Triton 3.10 no longer fuses unasked.
    chosen = {"num_warps": tile.warps, "enable_fp_fusion": True}
    if not tile.explicit:  # which have their own stages
        chosen["num_stages"] = tile.stages
    if early:
        chosen["launch_pdl"] = True
    return chosen if tile.max_registers is None else {**chosen, "maxnreg": tile.max_registers}


def constants(
    tile: Tile,
    *,
    order: int,
    group: int,
    scales: Any,
    asymmetric: bool,
    bias: bool,
    splits: int,
    cluster: int,
    even: bool,
    early: int,
    assembly: bool = True,
) -> dict[str, Any]:
    """What is compiled in, by the kernel's parameters and in their order.

    `group` is 0 for one group, `scales` a dtype of Triton, `cluster` how many programs are one, `even` says that a step
    divides the columns, `early` is the bytes of each row of tiles to ask for before the kernel before has ended,
    `assembly` False in the interpreter.
    """
    found = {
        "BITS": tile.bits,
        "ORDER": order,
        "GROUP": group,
        "SCALES": scales,
        "ASYM": asymmetric,
        "HAS_BIAS": bias,
        "SPLIT": splits > 1,
        "SIZE": cluster,
        "EVEN_K": even,
        "BM": tile.block_m,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "STAGES": tile.stages,
        "RAISED": tile.kind == "raised",
        "AHEAD": early,
        "USE_ASM": assembly,
    }
    return {name: found[name] for name in kernel_of(tile).arg_names if name in found}


class _Words:
    """The tiles of a weight as int32, for a descriptor that is kept: it keeps no memory alive."""

    dtype = torch.int32

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        """Where they begin."""
        return self._address


def describe_rows(x: Tensor, rows: int, columns: int, tile: Tile) -> Any:
    """The descriptor of x ``[rows, columns]`` of a pipelined kernel; columns are a multiple of 8."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ptq_kernels.triton.pipelined import x_layout

    return TensorDescriptor(x, [rows, columns], [columns, 1], [tile.block_m, tile.block_k], x_layout())


def describe_tiles(address: int, outputs: int, columns: int, tile: Tile) -> Any:
    """The descriptor of the tiles of a weight, rows of tiles as int32 ``[N / 64, 8 K]``, both padded to 128."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ptq_kernels.triton.pipelined import q_layout

    words = -(-columns // 128) * 1024
    block = [tile.block_n // 64, 8 * tile.block_k]
    return TensorDescriptor(_Words(address), [-(-outputs // 128) * 2, words], [words, 1], block, q_layout())
