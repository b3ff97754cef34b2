"""Products with second moments, ``[K, K]``: of a wide input one may be too large for the device that computes.

Such a matrix lies in the memory of the host; the products run where the other factor lies, panel by panel.
"""

import torch
from torch import Tensor

PANEL = 1024  # columns that travel at a time


def times(D_NK: Tensor, H_KK: Tensor) -> Tensor:
    """``D H``, where D lies."""
    if H_KK.device == D_NK.device:
        return D_NK @ H_KK
    return torch.cat([D_NK @ panel.to(D_NK.device) for panel in H_KK.split(PANEL, 1)], 1)


def add_product(H_KK: Tensor, left_TK: Tensor, right_TK: Tensor, alpha: float, beta: float = 1.0) -> None:
    """``H <- beta H + alpha left^T right``, computed where left and right lie."""
    if H_KK.device == left_TK.device:
        H_KK.addmm_(left_TK.t(), right_TK, beta=beta, alpha=alpha)
        return
    for panel, columns in zip(H_KK.split(PANEL, 1), right_TK.split(PANEL, 1), strict=True):
        panel.mul_(beta).add_((left_TK.t() @ columns).to(H_KK.device), alpha=alpha)
