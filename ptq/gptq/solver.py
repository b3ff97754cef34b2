"""GPTQ (Frantar et al., arXiv 2210.17323): rounds one column at a time and lets later columns make up for the error.

Letters as in the paper: ``W_NK`` the weight (N outputs, K inputs), ``H_KK = X^T X / T`` the Hessian of the squared
output error (there ``2 X X^T``, with tokens as columns: a factor changes no code), ``U_KK`` upper triangular with
``U^T U = inv(H + lam I)``, the ``Cholesky(H^-1)^T`` of its Algorithm 1. Pure functions: tensors in, tensors out; the
arithmetic runs in the dtype of H (float32 in a run, float64 in proofs).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ptq.errors import NumericsError
from ptq.gptq.columns import solve_block, steps_of
from ptq.gptq.inverse import ROWS, invert_to_factor, multiply_by_inverse
from ptq.grid import Grid, check_finite

ActivationOrder = Literal["static", "none"]


class Factor(NamedTuple):
    """What GPTQ needs of a Hessian; shared by every Linear that reads the same input."""

    U_KK: Tensor  # of the permuted, damped Hessian
    order_K: Tensor  # column visited at each step
    lam: float  # what was added to the diagonal
    damping: float  # lam as a fraction of the mean diagonal
    dead: int  # inputs that never fired
    rescues: tuple[str, ...]


class SolveResult(NamedTuple):
    """Codes ``uint8 [N, K]`` in original column order and what they cost.

    ``row_losses`` is the diagonal of ``D H D^T``, float64 ``[N]``: the mean squared error a token of each output, D the
    weight error; after the rescue ``diagonal`` it is that of the Hessian's diagonal alone.
    """

    codes: Tensor
    row_losses: Tensor

    @property
    def loss(self) -> float:
        """``trace(D H D^T)``."""
        return float(self.row_losses.sum())


def factorize(
    H_KK: Tensor,
    *,
    damping: float = 0.01,
    activation_order: ActivationOrder = "static",
    device: torch.device | None = None,
) -> Factor:
    """Damp, order and factorise a Hessian, which stays as it is; beside it and U there is no other matrix of its size.

    ``lam = damping * mean(diag H)``. A matrix that is not positive definite is tried again in float64, then with three
    times the damping up to 1, then as its diagonal alone (plain rounding in effect); each rescue is named in the
    result. U lies where H lies; ``device``, by default the same, is where the products run.

    Raises:
        NumericsError: H holds NaN or infinity.
    """
    check_finite(H_KK, "the Hessian")
    diagonal = H_KK.diagonal()
    mean = float(diagonal.abs().mean())
    dead = int((diagonal == 0).sum())
    if activation_order == "static":
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=H_KK.device)
    if mean == 0:  # nothing was ever fed in: every direction costs the same
        return Factor(torch.eye(len(order), dtype=H_KK.dtype, device=H_KK.device), order, 1.0, damping, dead, ())
    rescues: list[str] = []
    tried = damping
    while True:
        for dtype in dict.fromkeys((H_KK.dtype, torch.float64)):
            U_KK = _inverse_factor(H_KK, order, tried * mean, dtype, device)
            if U_KK is not None:
                return Factor(U_KK, order, tried * mean, tried, dead, tuple(rescues))
            if dtype != torch.float64:
                rescues.append("float64")
        if tried >= 1:
            rescues.append("diagonal")
            U_KK = torch.diag((diagonal[order].clamp(min=0) + mean).rsqrt())
            return Factor(U_KK, order, mean, tried, dead, tuple(rescues))
        tried = min(1.0, 3 * max(tried, 1e-6))
        rescues.append(f"damping {tried:.3g}")


def _inverse_factor(
    H_KK: Tensor, order_K: Tensor, lam: float, dtype: torch.dtype, device: torch.device | None
) -> Tensor | None:
    """``U`` with ``U^T U = inv(H + lam I)`` in that order, or None where Cholesky fails."""
    U_KK = torch.empty(H_KK.shape, dtype=dtype, device=H_KK.device)
    for start in range(0, len(order_K), ROWS):  # both ways of permuting at once would take another copy
        U_KK[start : start + ROWS] = H_KK[order_K[start : start + ROWS]][:, order_K]
    U_KK.diagonal().add_(lam)
    return U_KK.to(H_KK.dtype) if invert_to_factor(U_KK, device) else None


def gptq_solve(W_NK: Tensor, factor: Factor, grid: Grid, *, block_size: int = 128) -> SolveResult:
    """Choose the codes of one weight, column by column, each error pushed onto the columns still to come.

    Groups are static: the grid was chosen from the original weight in original column order, so whatever the order of
    the visits, column k keeps group ``k // group_size`` and no permutation is ever written to a checkpoint.

    Args:
        W_NK: weight in the dtype of the factor. Rows are independent, so Linears that share their input may be
            stacked along N.
        factor: of the input's Hessian.
        grid: scales and zeros, ``[N, G]``.
        block_size: columns between two updates of the rest of the weight; does not change the codes except for ties
            within rounding.

    Raises:
        NumericsError: W holds NaN or infinity.
    """
    check_finite(W_NK, "weight")
    codes, losses = solve_columns(in_order(W_NK, factor), factor, grid, block_size=block_size)
    return SolveResult(out_of_order(codes, factor), losses)


def in_order(W_NK: Tensor, factor: Factor) -> Tensor:
    """``[K, N]``: as the columns are visited, each contiguous."""
    return W_NK.t().contiguous().index_select(0, factor.order_K.to(W_NK.device))


def out_of_order(codes_KN: Tensor, factor: Factor) -> Tensor:
    """``[N, K]``, contiguous, in the weight's own order: undoes `in_order`."""
    codes_NK = codes_KN.index_select(0, torch.argsort(factor.order_K).to(codes_KN.device)).t()
    return codes_NK.clone(memory_format=torch.contiguous_format)  # of one row contiguous() would keep the strides


def solve_columns(W_KN: Tensor, factor: Factor, grid: Grid, *, block_size: int) -> tuple[Tensor, Tensor]:
    """GPTQ on a weight as `in_order` gives it, and on several grids at once: Algorithm 1 of the paper.

    The column by column part, its equation 2, is `solve_block`'s; here the rest of the weight is updated once for each
    block of columns, its equation 4.

    Args:
        W_KN: stays as it is.
        factor: of the input's Hessian.
        grid: ``[R, G]``, R a multiple of N: the rows of one grid, then those of the next.
        block_size: as for `gptq_solve`.

    Returns:
        Codes ``uint8 [K, R]`` in order, and what they lose, float64 ``[R]``.
    """
    K, N = W_KN.shape
    R = len(grid.scales)
    steps = steps_of(grid, factor.order_K, W_KN.dtype)
    W = W_KN.repeat(1, R // N)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    squared, moved = torch.zeros(2, R, dtype=torch.float64, device=W.device)
    for start in range(0, K, block_size):
        end = min(start + block_size, K)
        rows = factor.U_KK[start:end, start:].to(W.device)
        block = W[start:end]
        errors = solve_block(block, rows[:, : end - start], steps, start, codes[start:end])
        W[end:].addmm_(rows[:, end - start :].t(), errors, alpha=-1)
        squared += errors.square_().sum(0)
        difference = block.view(end - start, R // N, N).sub_(W_KN[start:end].unsqueeze(1))
        moved += difference.square_().sum(0).flatten()
    # A row's sum e^2 is its share of trace(D (H + lam I) D^T) exactly; less the damping's part it is the loss on H.
    return codes, squared.sub_(moved, alpha=factor.lam).clamp_(min=0)


def correction(X_RK: Tensor, factor: Factor, strength: float, device: torch.device | None = None) -> Tensor:
    """``strength * X inv(H)``, in X's place: with X the drift, what turns W into the weight to solve for.

    With X what a Linear will read and X_f what it read in the float model, the least-squares target of
    ``min_Q |X_f W^T - X Q^T|^2``, the objective of GPTAQ (arXiv 2504.02692), is
    ``W (X_f^T X) inv(X^T X) = W + W C inv(H)``, ``C = (X_f - X)^T X / T`` the drift. GPTAQ corrects as it goes through
    the columns; here the target moves before. ``W + W correction(C)`` and ``W + correction(W C)`` are the same; the one
    with fewer rows is the cheaper.

    Args:
        X_RK: C or W C; rows do not depend on each other.
        factor: of the Hessian; its damping applies.
        strength: share of the correction, 0 to 1: all of it follows the calibration text too closely.
        device: where the products run; by default where X lies.
    """
    order = factor.order_K.to(X_RK.device)
    for rows in X_RK.split(ROWS):
        ordered = rows[:, order].to(X_RK.device if device is None else device)
        multiply_by_inverse(ordered, factor.U_KK)
        rows[:, order] = ordered.mul_(strength).to(X_RK.device)
    return X_RK


def require_no_rescue(factor: Factor, name: str) -> None:
    """Under `strict`, a rescue is an error.

    Raises:
        NumericsError: the factorization needed a rescue.
    """
    if factor.rescues:
        raise NumericsError(
            f"strict: the Hessian of {name} must be positive definite with damping as configured; it needed "
            f"{', '.join(factor.rescues)}: give more calibration samples, raise gptq.damping, or set strict: false"
        )
