"""Matrix products of 16-bit floats on a processor that has no units for them.

torch computes them there at a fifth to a seventh of the rate of float32 products, batched ones at less than a fifteenth
(docs/performance.md). Both add up in float32, so products of float32 copies, rounded once, differ in the order of sums
alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from ptq_kernels.cpu import units
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

# Elements of what exists in float32 at one time, of either factor and of the product: 8 MB each.
CHUNK = 1 << 21
# Rows that a copy of columns serves at least, so that copying costs little beside the product.
LEAST_ROWS = 256
# Rows and columns of a product from which copies pay; torch takes another way with fewer, at the speed of memory.
SMALLEST = 8

_PRECISION = RLock()


@contextmanager
def fast_half_products(device: torch.device) -> Iterator[None]:
    """Let products of bfloat16 or float16 matrices use float32 units, where a processor has those alone.

    What else runs inside pays some microseconds an operation, save in `plain_products`. On other devices and processors
    this does nothing. Gradients go through these products as through torch's.

    Args:
        device: of the products.
    """
    halves = (torch.bfloat16, torch.float16)
    slow = tuple(dtype for dtype in halves if not units.has_units(dtype)) if device.type == "cpu" else ()
    with _Mode(slow) if slow else nullcontext():
        yield


@contextmanager
def plain_products() -> Iterator[None]:
    """All products are torch's own, nothing is paid for an operation, and float32 products are of float32 values,
    whatever `torch.set_float32_matmul_precision` permits the model.

    For what multiplies no 16-bit floats and does very many small operations, as solvers do. Another mode of torch that
    lies over `fast_half_products` stays, and that with it.
    """
    with float32_products(), _without_mode():
        yield


@contextmanager
def float32_products(on_cuda: str = "ieee", on_cpu: str = "ieee") -> Iterator[None]:
    """What float32 products may use: "ieee", or units for shorter types, "tf32" on CUDA and "bf16" on a CPU.

    torch has one setting for all threads, so one of them at a time is here; the others wait.
    """
    backends: tuple[Any, Any] = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")  # noqa: B009
    with _PRECISION:
        before = [backend.fp32_precision for backend in backends]
        for backend, precision in zip(backends, (on_cuda, on_cpu), strict=True):
            backend.fp32_precision = precision
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


@contextmanager
def _without_mode() -> Iterator[None]:
    mode = _get_current_dispatch_mode()
    if not isinstance(mode, _Mode):
        yield
        return
    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        mode.__enter__()  # type: ignore[no-untyped-call]


class _Mode(TorchDispatchMode):
    def __init__(self, slow: tuple[torch.dtype, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slow = slow

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What a module compiled for itself stays compiled; torch refuses whole graphs under other modes."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        product = _PRODUCTS.get(func)
        if product is not None and self._pays(*args):
            return product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _pays(self, *tensors: Tensor) -> bool:
        """Whether it is a product of the kind; not of what torch refuses, which is to say so itself."""
        a, b = tensors[-2:]
        if a.dtype not in self._slow or any((t.dtype, t.device.type) != (a.dtype, "cpu") for t in tensors):
            return False
        fits = a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
        return fits and min(a.shape[-2], b.shape[-1]) >= SMALLEST


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``[M, K] @ [K, N]``."""
    return _product(a, b, lambda a32, b32, *_: a32 @ b32)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * a @ b``; bias is broadcast to ``[M, N]``."""
    bias = bias.expand(len(a), b.shape[1])

    def piece(a32: Tensor, b32: Tensor, rows: slice, columns: slice) -> Tensor:
        return torch.addmm(bias[rows, columns].float(), a32, b32, beta=beta, alpha=alpha)

    return _product(a, b, piece)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """``[B, M, K] @ [B, K, N]``."""
    return _batched(a, b, lambda a32, b32, _: a32 @ b32)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * a @ b``; bias is broadcast to ``[B, M, N]``."""
    bias = bias.expand(len(a), a.shape[1], b.shape[2])

    def piece(a32: Tensor, b32: Tensor, some: slice) -> Tensor:
        return torch.baddbmm(bias[some].float(), a32, b32, beta=beta, alpha=alpha)

    return _batched(a, b, piece)


def _product(a: Tensor, b: Tensor, piece: Callable[[Tensor, Tensor, slice, slice], Tensor]) -> Tensor:
    """``[M, N]``, a piece at a time of float32 copies, its rows and its columns."""
    result = a.new_empty(len(a), b.shape[1])
    row_step = max(LEAST_ROWS, CHUNK // max(1, a.shape[1]))
    column_step = max(1, CHUNK // max(a.shape[1], min(row_step, len(a))))
    for row in range(0, len(a), row_step):
        rows = slice(row, row + row_step)
        a32 = a[rows].float()
        for column in range(0, b.shape[1], column_step):
            columns = slice(column, column + column_step)
            result[rows, columns] = piece(a32, b[:, columns].float(), rows, columns)
    return result


def _batched(a: Tensor, b: Tensor, piece: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
    """``[B, M, N]``, some of the B at a time."""
    result = a.new_empty(len(a), a.shape[1], b.shape[2])
    largest = max(each.shape[1] * each.shape[2] for each in (a, b, result))
    step = max(1, CHUNK // max(1, largest))
    for first in range(0, len(a), step):
        some = slice(first, first + step)
        result[some] = piece(a[some].float(), b[some].float(), some)
    return result


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.baddbmm.default: _baddbmm,
}
