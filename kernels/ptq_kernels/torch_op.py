"""The torch operators behind `ptq_kernels.matmul`: the product, its backward pass, and the product by a C++ library.

The implementation is chosen inside `matmul`: a traced graph holds one opaque call whatever the number of rows, so a
new batch size recompiles nothing. The kernel of `strips` is a C++ library's own function (`cpu/library.py`): a call of
it runs no Python. For inference only, and for arguments that were checked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptq_kernels import dispatch
from ptq_kernels.layouts import PackedWeight

# The low level interface costs a fraction of torch.library.custom_op on every call.
LIBRARY = torch.library.Library("ptq_kernels", "FRAGMENT")
LIBRARY.define(
    "matmul(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias,"
    " int bits, int group_size, str layout, str impl, Tensor? perm=None, str? activation=None) -> Tensor"
)
LIBRARY.define(
    "matmul_grad_input(Tensor grad, Tensor qweight, Tensor scales, Tensor? zeros,"
    " int bits, int group_size, int in_features, str layout, Tensor? perm=None) -> Tensor"
)
LIBRARY.define(
    "strips(Tensor x, Tensor qweight, Tensor bias,"
    " int out_features, int group_size, int bits, int scale_type, bool has_zeros, int mode) -> Tensor"
)


def _exactly(device: torch.device, compute: Callable[[], Tensor]) -> Tensor:
    """Compute outside of autocast, which would round float32 operands of an implementation's products."""
    if not torch.is_autocast_enabled(device.type):
        return compute()
    with torch.autocast(device.type, enabled=False):
        return compute()


def _shaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`result`, which nothing else holds, in another shape; autograd lets a view of it not be changed in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view.default(result, shape)
    return shaped


def _matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
    impl: str,
    perm: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, x.shape[-1], layout, perm)
    shape = (*x.shape[:-1], weight.out_features)
    if x.numel() == 0:
        return x.new_empty(shape)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _shaped(_exactly(x.device, lambda: dispatch.run(impl, rows, weight, bias, activation)), shape)


def _matmul_fake(x: Tensor, qweight: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


def _strips_fake(x: Tensor, qweight: Tensor, bias: Tensor, out_features: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _grad_input(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    layout: str,
    perm: Tensor | None = None,
) -> Tensor:
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features, layout, perm)
    shape = (*grad.shape[:-1], in_features)
    if grad.numel() == 0:
        return grad.new_empty(shape)
    rows = grad.reshape(-1, grad.shape[-1])
    return _shaped(_exactly(grad.device, lambda: dispatch.grad_input(rows, weight)), shape)


def _grad_input_fake(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    layout: str,
    perm: Tensor | None = None,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


Operator = Callable[..., Tensor]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what `backward` needs of the arguments of `matmul`."""
    x, qweight, scales, zeros, bias, bits, group_size, layout, _, perm, _ = inputs
    ctx.save_for_backward(qweight, scales, zeros, perm)
    ctx.scheme = (bits, group_size, x.shape[-1], layout)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor, by: Operator | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of what `matmul` takes, that of x by the operator `matmul_grad_input` or what stands for it."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        qweight, scales, zeros, perm = ctx.saved_tensors
        grad_x = (by or matmul_grad_input)(grad, qweight, scales, zeros, *ctx.scheme, perm)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, None, None


def setup_context_of_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what `backward_of_grad` needs of the arguments of `matmul_grad_input`."""
    _, qweight, scales, zeros, bits, group_size, _, layout, perm = inputs
    ctx.save_for_backward(qweight, scales, zeros, perm)
    ctx.scheme = (bits, group_size, layout)


def backward_of_grad(ctx: Any, grad: Tensor, by: Operator | None = None) -> tuple[Tensor | None, ...]:
    """The gradient's derivative, which a penalty on gradients needs, is the product again."""
    qweight, scales, zeros, perm = ctx.saved_tensors
    return (by or matmul)(grad, qweight, scales, zeros, None, *ctx.scheme, "auto", perm, None), *(None,) * 8


torch.library.impl("ptq_kernels::matmul", "default", _matmul, lib=LIBRARY)
torch.library.impl("ptq_kernels::matmul_grad_input", "default", _grad_input, lib=LIBRARY)
torch.library.register_fake("ptq_kernels::matmul", _matmul_fake, lib=LIBRARY)
torch.library.register_fake("ptq_kernels::matmul_grad_input", _grad_input_fake, lib=LIBRARY)
torch.library.register_fake("ptq_kernels::strips", _strips_fake, lib=LIBRARY)
torch.library.register_autograd("ptq_kernels::matmul", backward, setup_context=setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "ptq_kernels::matmul_grad_input", backward_of_grad, setup_context=setup_context_of_grad, lib=LIBRARY
)

matmul = torch.ops.ptq_kernels.matmul.default
matmul_grad_input = torch.ops.ptq_kernels.matmul_grad_input.default
strips = torch.ops.ptq_kernels.strips.default
