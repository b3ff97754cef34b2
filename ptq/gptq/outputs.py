"""GPTQ across the outputs of a Linear: rows that are solved later make up for what earlier ones lost.

GPTQ minimises ``trace(D H D^T)``, as if errors of different outputs did not meet again. To second order what a model's
predictions lose is nearer to ``trace(G D H D^T)``, with ``G_NN = E[g g^T]`` of the gradients g of its log likelihood
with respect to the outputs: YAQA (Tseng et al., arXiv 2505.22988), whose first sketch of G this is. Where rows A have
their codes and lose ``D_A = W_A - Q_A``, the others do best to aim at ``W_B + inv(G_BB) G_BA D_A``. That is GPTQ's own
recursion, from rows to rows; the columns of a row are solved as ever. Letters as in `ptq.gptq.solver`; pure functions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ptq.squares import times

# Rows whose errors are taken together: G is kept as its diagonal blocks of that size.
BLOCK = 512
# Rows of each block that are solved at once, blind to each other: fewer gain more and take more calls.
PART = 32
DAMPING = 0.01  # of the mean diagonal of a block of G, added to its diagonal,
NOISE = 2.0  # and of the share of outputs to tokens: of few tokens directions seem free of loss that are not

Found = TypeVar("Found")


def row_blocks(count: int) -> list[slice]:
    """The rows of each diagonal block of G."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def add_moments(blocks: Sequence[Tensor], gradients_TN: Tensor) -> None:
    """Add ``g g^T`` of every token to the diagonal blocks of G."""
    for block, rows in zip(blocks, row_blocks(gradients_TN.shape[1]), strict=True):
        part = gradients_TN[:, rows]
        block.addmm_(part.t(), part)


def settled(block: Tensor, tokens: int) -> Tensor:
    """The mean of ``g g^T`` from its sum over ``tokens``, drawn towards the identity by as much as it is uncertain.

    0 where the gradients are too small for float32 to hold their squares: what is left of them has no factor.
    """
    mean = block.div_(max(tokens, 1)).diagonal().mean()
    if mean < torch.finfo(torch.float32).tiny:
        return block.zero_()
    block.diagonal().add_((DAMPING + NOISE * len(block) / max(tokens, 1)) * mean)
    return block


def solve_by_parts(
    T_NK: Tensor, moments: Sequence[Tensor], solve: Callable[[Tensor], tuple[Tensor, Found]]
) -> Iterator[tuple[Tensor, Found]]:
    """Solve for a weight part by part, each part's error pushed onto the rows of its blocks still to come.

    Args:
        T_NK: what the codes are to stand for, float32.
        moments: diagonal blocks of G, ``[n, n]`` of `row_blocks`, each positive definite or 0.
        solve: takes rows of a moved target, ``[n, K]``, and returns the values of their codes and whatever else it
            found, which is handed on.

    Yields:
        The rows of a part, int64, and what ``solve`` found for them.
    """
    blocks = row_blocks(len(T_NK))
    factors = [_factor(each.to(T_NK.device)) for each in moments]
    moved = T_NK.clone()
    for start in range(0, min(BLOCK, len(T_NK)), PART):
        parts = [range(rows.start + start, min(rows.start + start + PART, rows.stop)) for rows in blocks]
        rows = torch.cat([torch.arange(part.start, max(part.start, part.stop), device=T_NK.device) for part in parts])
        target = moved[rows]
        values, found = solve(target)
        errors = (target - values).split([len(part) for part in parts])
        for block, U, part, error in zip(blocks, factors, parts, errors, strict=True):
            here = slice(start, start + len(part))
            if len(part) and part.stop < block.stop:
                e = torch.linalg.solve_triangular(U[here, here].t(), error, upper=False)
                moved[part.stop : block.stop].addmm_(U[here, here.stop :].t(), e, alpha=-1)
        yield rows, found


def output_loss(D_NK: Tensor, H_KK: Tensor, moments: Sequence[Tensor]) -> float:
    """``trace(G D H D^T)``, with G as its diagonal blocks."""
    total = 0.0
    for G, rows in zip(moments, row_blocks(len(D_NK)), strict=True):
        D = D_NK[rows]
        total += float((times(D, H_KK) @ D.t()).mul_(G.to(D.device)).sum(dtype=torch.float64))
    return total


def _factor(G: Tensor) -> Tensor:
    """``U``, upper triangular, with ``U^T U = inv(G)``; the identity for outputs that nothing depends on.

    In float64: a block is small, and its eigenvalues lie far apart.
    """
    if not bool(G.any()):
        return torch.eye(len(G), dtype=G.dtype, device=G.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G.double()))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(G.dtype)
