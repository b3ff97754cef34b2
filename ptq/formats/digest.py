"""A checksum of a buffer: BLAKE2b of 16 bytes, over the checksums of its chunks where there is more than one."""

import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy
import torch
from torch import Tensor

CHUNK_BYTES = 8 * 1024**2
DIGEST_BYTES = 16


def raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, in row-major order, as a ``uint8`` array on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(data: Any) -> str:
    """Hexadecimal checksum of a one-dimensional ``uint8`` array or of ``bytes``; chunks are summed side by side."""
    array = numpy.frombuffer(data, numpy.uint8) if isinstance(data, bytes) else data
    chunks = [array[start : start + CHUNK_BYTES] for start in range(0, len(array), CHUNK_BYTES)]
    if len(chunks) < 2:
        return _sum(array).hex()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        return _sum(b"".join(pool.map(_sum, chunks))).hex()


def _sum(chunk: Any) -> bytes:
    return blake2b(chunk, digest_size=DIGEST_BYTES).digest()
