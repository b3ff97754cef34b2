"""Products with weights whose groups are not contiguous, against float64 on any device.

As a program it runs the Triton kernels on them, in the interpreter where TRITON_INTERPRET is 1.
"""

from typing import NamedTuple

import ptq_kernels
import tile_cases
import torch
from packed_weights import Case, random_case, random_rows, worst_error
from ptq_kernels.layouts import PackedWeight
from torch import Tensor


class Spec(NamedTuple):
    n: int
    k: int
    group: int
    rows: int
    bits: int = 4
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = False


# whole tiles; ragged N and padded K; groups that no step of a kernel divides; one group a row (nothing to sort)
SPECS = [
    Spec(128, 256, 128, 1),
    Spec(130, 256, 64, 17),
    Spec(70, 160, 32, 3, symmetric=True),
    Spec(33, 60, 12, 2),
    Spec(17, 37, 37, 5),
]


def scattered(k: int, group: int) -> Tensor:
    """A random g_idx with ``group`` columns in each group."""
    generator = torch.Generator().manual_seed(k)
    return (torch.arange(k) // group)[torch.randperm(k, generator=generator)]


def dense(case: Case, g_idx: Tensor) -> Tensor:
    """The float64 weight ``[N, K]``: each column with the scale and zero of its group."""
    zeros = 2 ** (case.bits - 1) if case.zeros is None else case.zeros[:, g_idx].double()
    return case.scales[:, g_idx].double() * (case.codes.double() - zeros)


def worst(spec: Spec, impl: str, rounded: float = 0.0, device: str = "cpu") -> float:
    """The error, of what rounding allows, of a prepared weight and of the canonical one; at most 1 is right.

    A sum over columns does not depend on their order, so the bound is that of the weight with its columns sorted.
    `rounded` is what a weight may be rounded by, relative; of Triton's kernels the plan in force says it.
    """
    case = random_case(spec.n, spec.k, spec.group, spec.bits, spec.symmetric, torch.bfloat16)
    g_idx = scattered(spec.k, spec.group)
    x, bias = random_rows(spec.rows, spec.k, spec.dtype), torch.linspace(-1, 1, spec.n)
    tensors = [t if t is None else t.to(device) for t in case.tensors]
    prepared = ptq_kernels.prepare(*tensors, g_idx=g_idx, impl=impl, **case.sized)
    words = ptq_kernels.canonical(*prepared[:3], layout=prepared.layout, **case.sized)
    perm = prepared.perm.cpu().long()
    ordered = case._replace(codes=case.codes[:, perm])
    want = x.double() @ dense(case, g_idx).T
    assert torch.allclose(want, x[:, perm].double() @ dense(ordered, g_idx[perm]).T)
    errors = []
    for qweight, layout in ((prepared.qweight, prepared.layout), (words, "canonical")):
        if impl == "triton":
            weight = PackedWeight(qweight, *prepared[1:3], spec.bits, spec.group, spec.k, layout)
            rounded = tile_cases.weight_rounding(weight, spec.rows, spec.dtype, device)
        y = ptq_kernels.matmul(
            x.to(device), qweight, *prepared[1:3], bias.to(device),
            layout=layout, impl=impl, perm=prepared.perm, **case.scheme,
        )  # fmt: skip
        assert y.dtype == spec.dtype
        errors.append(worst_error(y.cpu(), x[:, perm], ordered, bias, rounded))
    return max(errors)


def main() -> None:
    from ptq_kernels.triton import configs, launch

    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = [spec._replace(dtype=dtype) for spec in SPECS for dtype in (torch.bfloat16, torch.float16)]
    for spec in [*every, *(SPECS[2]._replace(bits=bits) for bits in (2, 3, 8))]:
        error = worst(spec, "triton", device=device)
        assert error <= 1, (spec, error)  # NaN fails too
    tiles = configs.tiles(launch.gpu_of(torch.device(device)).order)
    folded = next(t for t in tiles if (t.kind, t.bits, t.span) == ("folded", 4, 128))
    for plan in (configs.Plan(folded, 1), None):  # a tile, and the dequantized weight, that round weights
        with launch.forced(plan):
            error = worst(SPECS[1], "triton", device=device)
            assert error <= 1, (plan, error)


if __name__ == "__main__":
    main()
