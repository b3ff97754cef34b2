"""The short way of `matmul` on a GPU (see direct.py): from a weight that was served once straight to the launch.

No operator is called, so whoever watches operators, a mode or a profiler, gets `ptq_kernels::matmul`. The kernel takes
addresses and sizes on trust: all that they depend on is compared with what was checked, for ``tensor.data = ...`` can
change it without making another tensor.
"""

from functools import cache

import torch
from torch import Tensor
from torch.autograd import profiler

from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import launch


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> "Product | None":
    """For the weight that has just been served for `x`; None where the kernel never multiplies such rows."""
    if _watched():  # who might make other tensors than are asked for: a mode of fake ones, a device that is the default
        return None
    plain = _plain_keys(x.device)
    if any(torch._C._dispatch_keys(t) not in plain for t in (weight.qweight, bias) if t is not None):
        return None
    made = Product(x, weight, bias)
    return made if made.layer.most_rows else None


@cache
def _plain_keys(device: torch.device) -> tuple[torch._C.DispatchKeySet, ...]:
    """The keys of tensors that are nothing but memory, made outside of inference mode and in it.

    Negative, sparse, functional and wrapped tensors, which the dispatcher would unpack, have others.
    """
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)))
    return tuple(found)


class Product:
    """The product with one weight, for rows of one dtype on one device."""

    __slots__ = ("bias", "columns", "dtype", "generation", "index", "keys", "layer", "qweight", "scales")

    def __init__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
        self.layer = launch.layer_of(x, weight, bias)
        self.generation = launch.generation
        self.columns = weight.in_features
        self.dtype, self.index = x.dtype, x.get_device()
        self.keys = _plain_keys(x.device)
        self.qweight = (weight.qweight.dtype, weight.qweight.shape)
        self.scales = weight.scales.dtype
        self.bias = None if bias is None else (bias.dtype, bias.shape)

    def __call__(
        self, x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, perm: Tensor | None
    ) -> Tensor | None:
        """``[..., N]``, or None where the long way has to be taken."""
        if (
            self.generation != launch.generation
            or x.dtype is not self.dtype
            or torch._C._dispatch_keys(x) not in self.keys
            or not self._fits(x)
            or not self._unchanged(qweight, scales, bias)
            or _watched()
            or (stream := launch.current_stream(self.index)) is None
        ):
            return None
        if perm is not None and not self._fits(x := x.index_select(-1, perm)):
            return None
        rows = x.numel() // self.columns
        if not 0 < rows < self.layer.most_rows:
            return None
        shape = self.layer.shape
        y = x.new_empty(*x.shape[:-1], shape[0])
        self.layer.launch(rows)((rows, *shape), x, qweight, bias, y, stream)
        return y

    def _fits(self, x: Tensor) -> bool:
        shape = x.shape
        return bool(
            shape
            and shape[-1] == self.columns
            and x.get_device() == self.index
            and x.is_contiguous()
            and not x.data_ptr() & 15
        )

    def _unchanged(self, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
        """Whether the tensors are where and what they were. Of scales and zeros the kernel reads copies in qweight."""
        return (
            (qweight.dtype, qweight.shape) == self.qweight
            and qweight.get_device() == self.index
            and qweight.is_contiguous()
            and not qweight.data_ptr() & 15
            and scales.dtype is self.scales
            and (
                bias is None
                or (
                    (bias.dtype, bias.shape) == self.bias
                    and bias.get_device() == self.index
                    and bias.is_contiguous()
                    and not bias.is_neg()
                    and not bias.data_ptr() & 15
                )
            )
        )


def _watched() -> bool:
    """Whether a mode or the profiler has to see an operator, and the launch of a kernel is none."""
    return bool(
        torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or profiler._is_profiler_enabled
    )
