"""Linears that read the same input as one product: q, k, v, and gate, up. Fewer launches, which small batches feel."""

from torch import Tensor, nn

from ptq.formats.gptq import FUSED_LINEARS
from ptq.nn.linear import QuantLinear


class FusedLinear(nn.Module):
    """Stands where one of several linears stood; the first one computes for all, the others hand out their part.

    The modules of a group must be called with the same tensor. One that is called with another tensor, or out of turn,
    computes the whole product again: slower, never wrong.
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
    def weight(self) -> Tensor:
        """The dense weight of this member, for code that looks at its dtype or device."""
        parts: tuple[Tensor, ...] = self.group.linear.weight.split(self.group.sizes)
        return parts[self.index]


class _Group:
    def __init__(self, linear: QuantLinear, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        self.x: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        if self.x is not x or index == 0:
            self.x, self.parts = x, self.linear(x).split(self.sizes, dim=-1)
        part = self.parts[index]
        if index == len(self.sizes) - 1:
            self.x, self.parts = None, ()  # keep nothing alive
        return part


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
