"""What raised codes lose on tensor cores, by calculation: they cut off what they add, towards 0, every 16 columns.

    python -m benchmarks.cut_off

Products of rows with 4-bit codes, 4096 columns in steps of 128, as tiles that subtract nothing from a code compute them
(kernels/ptq_kernels/triton/tiled.py): the sum of raised codes less the raise times the sum of the row, in float32. The
16 products and the sum so far are aligned to the largest of them and cut EXTRA bits below the last one of float32; how
many a GPU keeps is not published. Printed: the error of the result in norm, beside half a unit of the rows' dtype.
"""

import torch
from torch import Tensor

ROWS, COLUMNS, STEP, TOGETHER = 256, 4096, 128, 16
EXTRA = (0, 1, 2)
RAISED = (("float16, by 1024", torch.float16, 1024), ("float16, by 64", torch.float16, 64),
          ("bfloat16, by 128", torch.bfloat16, 128))  # fmt: skip


def _cut(values: Tensor, exponent: Tensor, bits: int) -> Tensor:
    unit = torch.exp2(exponent - bits)
    return torch.trunc(values / unit) * unit


def _sum(terms: Tensor, extra: int) -> Tensor:
    """The sum ``[N]`` of ``terms [N, STEP]``, as tensor cores add them; float64 holds all of it exactly."""
    total = terms.new_zeros(len(terms))
    for part in terms.split(TOGETHER, dim=1):
        most = torch.maximum(part.abs().amax(1), total.abs()).clamp_min(2.0**-126)
        exponent = torch.floor(torch.log2(most))
        total = _cut(part, exponent[:, None], 23 + extra).sum(1) + _cut(total, exponent, 23 + extra)
        total = _cut(total, torch.floor(torch.log2(total.abs().clamp_min(2.0**-126))), 23)
    return total


def lost(x: Tensor, codes: Tensor, raised: int, extra: int) -> float:
    """The relative error, in norm, of the products of a row with codes whose zero is 8."""
    found = torch.zeros(len(codes))
    for start in range(0, COLUMNS, STEP):
        row = x[start : start + STEP]
        much = _sum((codes[:, start : start + STEP] + raised) * row, extra)
        ones = _sum(row[None], extra)
        found += (much - ones * (raised + 8)).float()
    want = (codes - 8) @ x
    return float((found.double() - want).norm() / want.norm())


def main() -> None:
    """Print a line for each raise and kind of row."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator).double()
    drawn = torch.randn(COLUMNS, generator=generator)
    print(
        f"{'codes raised':18s} {'rows':10s} "
        + " ".join(f"{f'{extra} extra bits':>12s}" for extra in EXTRA)
        + "  half a unit"
    )
    for name, dtype, raised in RAISED:
        for kind, x in (("normal", drawn), ("positive", drawn.abs())):
            errors = [lost(x.to(dtype).double(), codes, raised, extra) for extra in EXTRA]
            print(
                f"{name:18s} {kind:10s} "
                + " ".join(f"{error:12.1e}" for error in errors)
                + f"  {torch.finfo(dtype).eps / 2:.1e}"
            )


if __name__ == "__main__":
    main()
