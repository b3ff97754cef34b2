"""A dense weight that is computed when its values are asked for.

Models look at ``linear.weight.dtype`` in their forward passes (T5 does, three times a block): that must not cost what
the whole weight costs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import swap_tensors
from torch.utils._pytree import tree_map_only

# What a tensor knows without its values.
_KNOWN = {
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.nelement,
    Tensor.numel,
    Tensor.size,
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "is_cpu", "is_cuda", "is_meta", "itemsize", "nbytes", "ndim", "shape")
    ),
}


class LazyWeight(Tensor):
    """A tensor of which only dtype, device and shape are there until anything else is done with it.

    Then it becomes the dense tensor itself, class and all, so that whoever looks at what it is finds nothing unusual.
    """

    _make: Callable[[], Tensor]
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> Any:
        """``make`` computes a tensor of that shape and dtype on that device; it is called once, and not before."""
        found = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        found._make, found._dense = make, None
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Autograd and torch.func see the dense weight, as if it had been there all along."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {})) if func in _KNOWN else _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without its first argument
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """For what reaches C++ by another way."""
        return _with_values(func, args, kwargs)

    def values(self) -> Tensor:
        """The dense weight; mostly this very object, for C++ may hold it in a way that forbids that."""
        if self._dense is not None:
            return self._dense
        dense = self._make()
        if type(dense) is Tensor:
            with suppress(RuntimeError):
                swap_tensors(self, dense)
                return self
        self._dense = dense
        return dense


def _with_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    args, kwargs = tree_map_only(LazyWeight, LazyWeight.values, (tuple(args), dict(kwargs or {})))
    return func(*args, **kwargs)
