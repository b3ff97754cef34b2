"""The short way of `matmul`: past the checks and past operators that are written in Python.

Those cost several times what a small product does. A weight that was checked and served once needs them again only
where something other than the values of x is different from the call before. On a CPU the short way is the operator
`ptq_kernels::strips`, which a C++ library serves itself; on a GPU it is the launch of the kernel (triton/eager.py).
Neither has gradients or other transforms: who wants those gets `ptq_kernels::matmul`.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ptq_kernels import dispatch, tiles, torch_op
from ptq_kernels.cpu import library, strips
from ptq_kernels.layouts import PackedWeight

Scheme = tuple[int, int, str, str, str | None]  # bits, group size, layout, impl, activation
# Of x, qweight, scales, bias and perm; None where something besides the values of x has changed.
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor | None]


class _Ready(NamedTuple):
    """What is known of a weight, and by what to know that it is the one."""

    qweight: Callable[[], Tensor | None]  # weak references: what is remembered keeps nothing alive
    scales: Callable[[], Tensor | None]
    zeros: Callable[[], Tensor | None]
    bias: Callable[[], Tensor | None]
    perm: Callable[[], Tensor | None]
    product: Product


_ready: dict[tuple[int, Scheme], _Ready] = {}  # by id of qweight


def remember(x: Tensor, weight: PackedWeight, bias: Tensor | None, scheme: Scheme) -> None:
    """Let the next call with these very tensors take the short way, where there is one; `x` has just been served."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or not x.numel():
        return
    qweight, plain = weight.qweight, (Tensor, Parameter)
    if not qweight.is_contiguous() or type(qweight) not in plain:
        return
    if bias is not None and (not bias.is_contiguous() or type(bias) not in plain):
        return
    if (product := _product(x, weight, bias, scheme)) is None:
        return
    key = (id(qweight), scheme)
    forget = partial(_forget, _ready, key)
    _ready[key] = _Ready(
        weakref.ref(qweight, forget),
        weakref.ref(weight.scales, forget),
        _nothing if weight.zeros is None else weakref.ref(weight.zeros, forget),
        _nothing if bias is None else weakref.ref(bias, forget),
        _nothing if weight.perm is None else weakref.ref(weight.perm, forget),
        product,
    )


def _product(x: Tensor, weight: PackedWeight, bias: Tensor | None, scheme: Scheme) -> Product | None:
    """The short way of a weight, if it has one. The implementation is looked up only for the device that served x."""
    impl, activation = scheme[3:]
    if weight.layout == "strips" and weight.perm is None and x.device.type == "cpu" and dispatch.is_best(impl):
        return partial(_by_strips, weight.in_features, strips.arguments(weight), activation, library.generation)
    if weight.layout not in tiles.NAMES or type(x) is not Tensor or _transformed(x, weight.scales, bias):
        return None
    if dispatch.choose(impl, x.device) != "triton":
        return None
    from ptq_kernels.triton import eager

    return eager.product(x, weight, bias)


def _forget(ready: dict[tuple[int, Scheme], _Ready], key: tuple[int, Scheme], _: object) -> None:
    """One of the tensors is gone. A dead reference gives None, which must not be taken for "no zeros" or "no bias"."""
    ready.pop(key, None)


def product(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    perm: Tensor | None,
    scheme: Scheme,
) -> Tensor | None:
    """The product of these arguments, if they were remembered and nothing but the product is wanted; else None."""
    if torch.compiler.is_compiling():
        return None
    try:
        ready = _ready.get((id(qweight), scheme))
    except TypeError:  # a list, say, which the checks refuse
        return None
    if ready is None:
        return None
    if (
        ready.qweight() is qweight
        and ready.scales() is scales
        and ready.zeros() is zeros
        and ready.bias() is bias
        and ready.perm() is perm
        and type(x) is Tensor
        and not _transformed(x, scales, bias)
    ):
        return ready.product(x, qweight, scales, bias, perm)
    return None


def _by_strips(
    in_features: int,
    arguments: tuple[int, int, int, int, bool],  # of the operator, between the tensors and the mode
    activation: str | None,
    generation: int,
    x: Tensor,
    qweight: Tensor,
    _scales: Tensor,
    bias: Tensor | None,
    _perm: Tensor | None,
) -> Tensor | None:
    """The short way on a CPU. That qweight and bias are still what they were the operator itself checks."""
    if (
        generation == library.generation
        and x.is_cpu
        and x.dtype in strips.TYPES
        and x.dim()
        and x.shape[-1] == in_features
        and x.is_contiguous()
        and (bias is None or bias.is_contiguous())
    ):
        mode = strips.mode(x.dtype, activation)
        y: Tensor = torch_op.strips(x, qweight, qweight if bias is None else bias, *arguments, mode)
        return y
    return None


def traced(x: Tensor, weight: PackedWeight, bias: Tensor | None, scheme: Scheme) -> Tensor | None:
    """The product for a graph that torch.compile makes of checked arguments, where it is the short one; else None."""
    if (
        weight.layout != "strips"
        or x.dtype not in (torch.bfloat16, torch.float16)  # float32 depends on a setting that may change
        or scheme[3] not in ("auto", "cpu")
        or scheme[4] is not None
        or torch.is_grad_enabled()
        or torch.compiler.is_exporting()
    ):
        return None
    rows = x if weight.perm is None else x.index_select(-1, weight.perm)
    placeholder = weight.qweight if bias is None else bias
    mode = strips.mode(x.dtype, None)
    y: Tensor = torch_op.strips(rows.contiguous(), weight.qweight, placeholder, *strips.arguments(weight), mode)
    return y


def _transformed(x: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, a transform or the tracer has to see an operator that it knows."""
    return bool(
        (
            torch.is_grad_enabled()
            and (x.requires_grad or scales.requires_grad or (bias is not None and bias.requires_grad))
        )
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or x.is_neg()
    )


def _nothing() -> None:
    return None
