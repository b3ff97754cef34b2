"""What the groups of a weight lose on several grids, in the C++ library (see grids.h)."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels.cpu import library


class Groups(NamedTuple):
    """A weight that is rounded group by group, and what an error costs."""

    weight: Tensor  # float32 [N, G, g]
    cost: Tensor  # float32 [G, g], of each column's squared error
    top: int  # the largest code


def serves(groups: Groups) -> bool:
    """Whether a C++ library can be used and takes these tensors: on the CPU, float32, contiguous."""
    tensors = (groups.weight, groups.cost)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return fits and library.best() is not None


def losses(groups: Groups, scales: Tensor, zeros: Tensor) -> Tensor:
    """Sums of cost times squared error, float32, on each of the grids ``scales``, ``zeros [C, N, G]``; as many."""
    scales, zeros = scales.contiguous(), zeros.contiguous()
    assert scales.shape == zeros.shape == (len(scales), *groups.weight.shape[:2])
    found = torch.empty_like(scales)
    library.present().grid_losses(ctypes.byref(_structure(groups)), len(scales), *_addresses(scales, zeros, found))
    return found


def moments(groups: Groups, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, G]`` each, float32: sums of cost times c squared, and times c and the weight, c the code minus the zero."""
    scales, zeros = scales.contiguous(), zeros.contiguous()
    assert scales.shape == zeros.shape == groups.weight.shape[:2]
    squares, products = torch.empty_like(scales), torch.empty_like(scales)
    library.present().grid_moments(ctypes.byref(_structure(groups)), *_addresses(scales, zeros, squares, products))
    return squares, products


def _structure(groups: Groups) -> library.Groups:
    """For the library, which checks nothing."""
    assert groups.cost.shape == groups.weight.shape[1:]
    return library.Groups(*groups.weight.shape, *_addresses(groups.weight, groups.cost), float(groups.top))


def _addresses(*tensors: Tensor) -> list[int]:
    assert all(t.dtype == torch.float32 for t in tensors)
    return [tensor.data_ptr() for tensor in tensors]
