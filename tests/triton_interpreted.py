"""Runs the kernel for canonical weights in Triton's interpreter and prints its worst error; a program, because the
interpreter must be chosen before Triton is imported. Arguments: which part of how many, and "every" for all cases.
"""

import itertools
import os
import sys
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import ptq_kernels
import torch
from packed_weights import random_case, random_rows, worst_error
from pairwise import pairwise
from quick_interpreter import quick
from tile_cases import ROWS, SCALES
from watched_memory import watched

# N, K, group size: groups of 32, 64, 128 and one a row; ragged N; groups that a step divides, that none divides, and
# below one step
SHAPES = [
    (70, 128, 64),
    (40, 96, 32),
    (8, 256, 128),
    (33, 60, 12),
    (17, 37, 37),
    (64, 80, 40),
    (16, 20, 5),
    (64, 192, 96),
    (1, 32, 32),
    (65, 130, 130),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Spec(NamedTuple):
    bits: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    symmetric: bool
    rows: int
    bias: bool
    scales: torch.dtype


OPTIONS = ((2, 3, 4, 8), SHAPES, DTYPES, (True, False), ROWS, (True, False), SCALES)  # the fields of a Spec


def every_spec() -> list[Spec]:
    """Everything with everything, but with one dtype of scales each: a kernel converts them when it loads them."""
    return [Spec(*values, SCALES[i % 3]) for i, values in enumerate(itertools.product(*OPTIONS[:-1]))]


def few_specs() -> list[Spec]:
    """Every two values of two different options meet in one of them."""
    return [Spec(*values) for values in pairwise(OPTIONS)]


def check(spec: Spec) -> float:
    """The error of a random product in units of what rounding allows; at most 1 is right."""
    n, k, group = spec.shape
    case = random_case(n, k, group, spec.bits, spec.symmetric, spec.scales)
    x, bias = random_rows(spec.rows, k, spec.dtype), torch.linspace(-1, 1, n).to(spec.dtype) if spec.bias else None
    y = ptq_kernels.matmul(x, *case.tensors, bias, impl="triton", **case.scheme)
    assert y.dtype == spec.dtype
    return worst_error(y, x, case, bias, 0.0)


@quick()
@watched()
def main() -> None:
    part, parts = int(sys.argv[1]), int(sys.argv[2])
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    specs = every_spec() if "every" in sys.argv[3:] else few_specs()
    worst = 0.0
    for spec in specs[part::parts]:
        error = check(spec)
        assert error <= 1, (spec, error)  # NaN fails too
        worst = max(worst, error)
    print("cases:", len(specs[part::parts]), "worst error, of what rounding allows:", worst)
    print(ptq_kernels.chosen())


if __name__ == "__main__":
    main()
