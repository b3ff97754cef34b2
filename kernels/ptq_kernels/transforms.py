"""The product for PyTorch's function transforms and for forward-mode derivatives.

What an operator of torch.library registers as its backward pass serves neither: under `torch.func.grad` it is refused,
and a tangent is dropped without a word. Both functions here are linear in their first argument, so each is the
derivative of the other, to any order.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ptq_kernels import torch_op
from ptq_kernels.layouts import PackedWeight


def wanted() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is being computed.

    Raises RuntimeError where torch.compile traces a forward-mode derivative, which would become zero in the graph;
    unless the graph must be whole, torch.compile then leaves that call to Python. It traces vmap of the operator and
    refuses gradients inside of a graph by itself.
    """
    forward: bool = forward_ad._current_level >= 0
    if not torch.compiler.is_compiling():
        return forward or torch._C._are_functorch_transforms_active()
    if forward:
        raise RuntimeError(
            "forward-mode derivatives of a packed weight's product cannot be part of a compiled graph; call "
            "torch.func.jvp or torch.func.jacfwd outside of torch.compile"
        )
    return False


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None, impl: str, activation: str | None) -> Tensor:
    """`torch_op.matmul` of checked arguments, for reverse and forward mode of any order and for vmap."""
    tensors = (weight.qweight, weight.scales, weight.zeros, weight.perm)
    return _apply(_Product, x, bias, *tensors, weight.bits, weight.group_size, weight.layout, impl, activation)


def _apply(function: type[Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def _batched(
    function: Any, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """What vmap makes of `function`: rows are one more dimension of the first argument, anything else is repeated."""
    first, *rest = in_dims
    if first is not None and not any(dim is not None for dim in rest):
        return function(arguments[0].movedim(first, 0), *arguments[1:]), 0
    each = (
        function(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    )
    return torch.stack(list(each)), 0


class _Product(Function):
    """``x`` times the weight, plus ``bias``."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        qweight, scales, zeros, perm, bits, group_size, layout, impl, activation = weight
        y: Tensor = torch_op.matmul(x, qweight, scales, zeros, bias, bits, group_size, layout, impl, perm, activation)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, *weight = inputs
        ctx.save_for_backward(*weight[:4])
        ctx.save_for_forward(*weight[:4])
        ctx.scheme, ctx.impl, ctx.in_features, ctx.shape = tuple(weight[4:7]), weight[7], x.shape[-1], output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _apply(_GradInput, grad, *ctx.saved_tensors, *ctx.scheme, ctx.in_features)
        if ctx.needs_input_grad[1]:
            grad_bias = torch_op.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_bias, *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *_: object) -> Tensor | None:
        """The tangent; as in the backward pass, 8-bit rounding of x counts as the identity."""
        if x is not None:
            return _apply(_Product, x, bias, *ctx.saved_tensors, *ctx.scheme, ctx.impl, None)
        return None if bias is None else bias.expand(ctx.shape).clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _batched(partial(_apply, _Product), info.batch_size, in_dims, arguments)


class _GradInput(Function):
    """``grad`` times the transposed weight."""

    @staticmethod
    def forward(grad: Tensor, *weight: Any) -> Tensor:
        qweight, scales, zeros, perm, bits, group_size, layout, in_features = weight
        grad_x: Tensor = torch_op.matmul_grad_input(
            grad, qweight, scales, zeros, bits, group_size, in_features, layout, perm
        )
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])
        ctx.scheme, ctx.in_features = inputs[5:8], inputs[8]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(_Product, grad, None, *ctx.saved_tensors, *ctx.scheme, "auto", None), *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: object) -> Tensor:
        return _apply(_GradInput, grad, *ctx.saved_tensors, *ctx.scheme, ctx.in_features)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _batched(partial(_apply, _GradInput), info.batch_size, in_dims, arguments)


def _vmap(operator: Any) -> Any:
    return lambda info, in_dims, *arguments: _batched(operator, info.batch_size, in_dims, arguments)


for _operator in (torch_op.matmul, torch_op.matmul_grad_input):  # for graphs, which hold the operators themselves
    torch.library.register_vmap(_operator.name(), _vmap(_operator), lib=torch_op.LIBRARY)
