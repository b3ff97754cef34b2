"""Runs the Triton kernel in Triton's interpreter and prints its worst error; a program, because the interpreter must be
chosen before Triton is imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import ptq_kernels
import torch
from packed_weights import random_case, random_rows, worst_error

# N, K, group size: a step that divides the group, ragged N, a group that no step divides, a group below one step
SHAPES = [(70, 128, 64), (33, 60, 12), (17, 37, 37), (64, 80, 40), (16, 20, 5), (64, 192, 96), (8, 256, 128)]


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    worst = 0.0
    for bits in (2, 3, 4, 8):
        for index, (n, k, group) in enumerate(SHAPES):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                case = random_case(n, k, group, bits, symmetric=index % 2 == 0, dtype=dtype)
                rows = (1, 19, 33)[index % 3]
                x, bias = random_rows(rows, k, dtype), torch.linspace(-1, 1, n).to(dtype) if index % 2 else None
                y = ptq_kernels.matmul(x, *case.tensors, bias, impl="triton", **case.scheme)
                error = worst_error(y, x, case, bias, 0.0)
                assert error <= 1, (bits, n, k, group, dtype, error)  # NaN fails too
                worst = max(worst, error)
    print("worst error, of what rounding allows:", worst)
    print(ptq_kernels.chosen())


if __name__ == "__main__":
    main()
