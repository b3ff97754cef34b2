"""The inverse factor of a large symmetric matrix: in place, and nearly all of it in matrix products.

LAPACK's Cholesky and triangular solve reach a fraction of the rate of a matrix product, and each wants a copy of the
matrix. Both steps here go through the matrix panel by panel, each panel once: what is to its right (or above it) is
multiplied in one product with a long inner dimension. The matrix may lie elsewhere than where the products run: then
only tiles of it travel.
"""

import torch
from torch import Tensor

# Columns finished at a time: only their diagonal block is left to LAPACK.
PANEL = 256
# Rows of a tile: bounds what travels and what is multiplied by zeros.
ROWS = 1024


def invert_to_factor(A_KK: Tensor, device: torch.device | None = None) -> bool:
    """Replace a symmetric A by the upper triangular ``U`` with ``U^T U = inv(A)``; False where Cholesky fails.

    With ``R R^T = A``, R upper triangular, taken from the last column to the first, ``U = inv(R)``. Only the upper
    triangle of A is read. After a failure A holds nothing of use. The products run on ``device``, by default A's own.
    """
    device = A_KK.device if device is None else device
    if not _reverse_cholesky(A_KK, device):
        return False
    A_KK.triu_()
    _invert_upper(A_KK, device)
    return True


def _reverse_cholesky(A: Tensor, device: torch.device) -> bool:
    """Replace the upper triangle by R, its diagonal blocks already inverted: nothing else reads them."""
    for start, end in reversed(_panels(len(A))):
        right = A[start:end, end:].to(device).t()
        for row in range(0, end, ROWS):
            rows = slice(row, min(row + ROWS, end))
            tile = A[rows, start:end].to(device)
            A[rows, start:end] = tile.addmm_(A[rows, end:].to(device), right, alpha=-1)
        inverse = _inverse_of_block(A[start:end, start:end].to(device))
        if inverse is None:
            return False
        for row in range(0, start, ROWS):
            rows = slice(row, min(row + ROWS, start))
            A[rows, start:end] = A[rows, start:end].to(device) @ inverse.t()
        A[start:end, start:end] = inverse
    return True


def _inverse_of_block(block: Tensor) -> Tensor | None:
    """Of a small symmetric matrix, with J the index reversal: ``R = J chol(J A J) J``, inverted."""
    L, info = torch.linalg.cholesky_ex(block.flip(0, 1))
    identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True)
    return None if int(info) or not bool(torch.isfinite(inverse).all()) else inverse


def _invert_upper(A: Tensor, device: torch.device) -> None:
    """R, below whose diagonal there are zeros and whose diagonal blocks are inverted, becomes its inverse."""
    for start, end in _panels(len(A)):
        inverse = A[start:end, start:end].to(device)
        # A tile of rows reads the panel from its own first row on, so that what is above may be overwritten.
        for row in range(0, start, ROWS):
            rows = slice(row, min(row + ROWS, start))
            tile = A[rows, row:start].to(device) @ A[row:start, start:end].to(device)
            A[rows, start:end] = (tile @ inverse).neg_()


def multiply_by_inverse(X_RK: Tensor, U_KK: Tensor) -> None:
    """Replace X by ``X U^T U``, for U as `invert_to_factor` leaves it: X times the inverse. In X's place and device."""
    for start, end in _panels(len(U_KK)):
        X_RK[:, start:end] = X_RK[:, start:] @ U_KK[start:end, start:].to(X_RK.device).t()
    for start, end in reversed(_panels(len(U_KK))):
        X_RK[:, start:end] = X_RK[:, :end] @ U_KK[:end, start:end].to(X_RK.device)


def _panels(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]
