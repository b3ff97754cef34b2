"""Fused dequantize-matmul kernels for weights of 2, 3, 4 and 8 bits, on GPU (Triton) and CPU.

`matmul` is the product; `reference.py` is its specification; `pack` and `unpack` are the storage format; `prepare` and
`canonical` convert between it and the layout an implementation runs fastest; `group_order` is for weights whose groups
are not contiguous; `warmup` goes before CUDA graphs; `chosen` and `recorded` say what has run, `foreseen` what would.
Importing this package imports torch only: no Triton, no CUDA initialisation.
"""

from ptq_kernels.api import Prepared, canonical, dequantize, matmul, prepare, warmup
from ptq_kernels.bitstream import pack, unpack
from ptq_kernels.dispatch import chosen, foreseen, recorded
from ptq_kernels.order import group_order

__all__ = [
    "Prepared",
    "canonical",
    "chosen",
    "dequantize",
    "foreseen",
    "group_order",
    "matmul",
    "pack",
    "prepare",
    "recorded",
    "unpack",
    "warmup",
]
