"""Linears that read the same input as one product: q, k, v, and gate, up. Fewer launches, which small batches feel."""

import threading

import torch
from torch import Tensor, nn

from ptq.formats.codec import FUSED_LINEARS
from ptq.nn.linear import QuantLinear


class FusedLinear(nn.Module):
    """Stands where one of several linears stood; the first one computes for all, the others hand out their part.

    The modules of a group must be called with the same tensor. One that is called with another tensor, or out of turn,
    or after the tensor has changed in place, or where gradients are recorded and were not, computes the whole product
    again: slower, never wrong. In inference mode, inside torch.compile, and of changes through ``.data``, torch gives
    no count of changes: there, change the tensor in place only when all members have read it.
    """

    group: "_Group"

    def __init__(self, group: "_Group", index: int) -> None:
        """Member `index` of a group; the first one owns the packed weight, so moves of the model reach it once."""
        super().__init__()
        self.in_features, self.out_features = group.linear.in_features, group.sizes[index]
        self.index = index
        self.linear = group.linear if index == 0 else None
        object.__setattr__(self, "group", group)  # not a module: the weight is not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]`` of this member, a view of the fused result."""
        return self.group.part(x, self.index)

    @property
    def bias(self) -> Tensor | None:
        """The bias of this member, or None."""
        whole = self.group.linear.bias
        return None if whole is None else whole.split(self.group.sizes)[self.index]

    @property
    def weight(self) -> Tensor:
        """The dense weight of this member, for code that looks at its dtype or device."""
        parts: tuple[Tensor, ...] = self.group.linear.weight.split(self.group.sizes)
        return parts[self.index]


class _Group:
    def __init__(self, linear: QuantLinear, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        # By thread: the input of the product that its members hand out, its version and whether gradients are recorded,
        # the parts.
        self.open: dict[int, tuple[Tensor, tuple[int, bool], tuple[Tensor, ...]]] = {}

    def part(self, x: Tensor, index: int) -> Tensor:
        compiling = torch.compiler.is_compiling()  # a trace is one thread's, and cannot compare versions
        thread = 0 if compiling else threading.get_ident()
        version = 0 if compiling or x.is_inference() else x._version, torch.is_grad_enabled()
        found = self.open.get(thread)
        if index == 0 or found is None or found[0] is not x or found[1] != version:
            found = (x, version, self.linear(x).split(self.sizes, dim=-1))
        if index == len(self.sizes) - 1:
            self.open.pop(thread, None)  # keep nothing alive
        else:
            self.open[thread] = found
        return found[2][index]


def fuse_linears(model: nn.Module) -> list[str]:
    """Fuse in place every q, k, v and every gate, up of `model` that can be; the paths of their parents and names.

    Can be: each is a QuantLinear of the same scheme, input width, order of columns, dtype and device, all with a bias
    or none. The result is for inference: a state dict of the model then has the fused tensors.
    """
    done = []
    for path, parent in list(model.named_modules()):
        for members in FUSED_LINEARS.values():
            linears = [getattr(parent, name, None) for name in members]
            found = [linear for linear in linears if isinstance(linear, QuantLinear)]
            if len(found) < len(members) or len({_kind(linear) for linear in found}) > 1:
                continue
            group = _Group(_concatenated(found), [linear.out_features for linear in found])
            for index, name in enumerate(members):
                setattr(parent, name, FusedLinear(group, index))
            done.append(".".join([path, "+".join(members)]).lstrip("."))
    return done


def _kind(linear: QuantLinear) -> tuple[object, ...]:
    scheme = (linear.bits, linear.group_size, linear.symmetric, linear.in_features, linear.impl, linear.activation)
    bias = None if linear.bias is None else linear.bias.dtype
    order = None if linear.perm is None else tuple(linear.perm.tolist())
    return (*scheme, linear.scales.dtype, linear.scales.device, bias, order)


def _concatenated(linears: list[QuantLinear]) -> QuantLinear:
    prepared = linears[0].layout != "canonical"
    first = linears[0]
    fused = QuantLinear.stacked(linears)
    fused.impl, fused.activation = first.impl, first.activation
    return fused.prepare_() if prepared else fused
