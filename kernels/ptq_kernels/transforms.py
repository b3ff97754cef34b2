"""The product for PyTorch's function transforms and for forward-mode derivatives.

What an operator of torch.library registers as its backward pass serves neither: under `torch.func.grad` it is refused,
and a tangent is dropped without a word. Both functions here are linear in their first argument, so each is the
derivative of the other, to any order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ptq_kernels import torch_op


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


def matmul(*arguments: Any) -> Tensor:
    """`torch_op.matmul` of the same arguments, for reverse and forward mode of any order and for vmap."""
    return _apply(_Product, *arguments)


def _grad_input(*arguments: Any) -> Tensor:
    """`torch_op.matmul_grad_input`, likewise."""
    return _apply(_GradInput, *arguments)


def _apply(function: type[Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def _vmap(function: torch_op.Operator) -> Callable[..., tuple[Tensor, int]]:
    """What vmap makes of a function: rows are one more dimension of the first argument, anything else is repeated."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        first, *rest = in_dims
        if first is not None and not any(dim is not None for dim in rest):
            return function(arguments[0].movedim(first, 0), *arguments[1:]), 0
        each = (
            function(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        )
        return torch.stack(list(each)), 0

    return batched


class _Product(Function):
    forward = staticmethod(torch_op.matmul)
    vmap = staticmethod(_vmap(matmul))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        torch_op.setup_context(ctx, inputs, output)
        _, qweight, scales, zeros, *_, ctx.impl, perm, _ = inputs
        ctx.save_for_forward(qweight, scales, zeros, perm)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch_op.backward(ctx, grad, _grad_input)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *tangents: Tensor | None) -> Tensor | None:
        """The tangent; as in the backward pass, 8-bit rounding of x counts as the identity."""
        bias = tangents[3]
        if x is None:
            return None if bias is None else bias.expand(ctx.shape).clone()
        qweight, scales, zeros, perm = ctx.saved_tensors
        bits, group_size, _, layout = ctx.scheme
        return matmul(x, qweight, scales, zeros, bias, bits, group_size, layout, ctx.impl, perm, None)


class _GradInput(Function):
    forward = staticmethod(torch_op.matmul_grad_input)
    vmap = staticmethod(_vmap(_grad_input))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        torch_op.setup_context_of_grad(ctx, inputs, output)
        _, qweight, scales, zeros, *ctx.rest, perm = inputs
        ctx.save_for_forward(qweight, scales, zeros, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch_op.backward_of_grad(ctx, grad, matmul)

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: object) -> Tensor:
        qweight, scales, zeros, perm = ctx.saved_tensors
        return _grad_input(grad, qweight, scales, zeros, *ctx.rest, perm)


for _operator in (torch_op.matmul, torch_op.matmul_grad_input):  # for graphs, which hold the operators themselves
    torch.library.register_vmap(_operator.name(), _vmap(_operator), lib=torch_op.LIBRARY)
