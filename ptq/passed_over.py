"""What multiplies in a module and is no Linear that can be packed in its place, so that it stays in float."""

import warnings
from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn

from ptq.config import matches
from ptq.models.experts import is_lazy, routers, stacks
from ptq.nn.linear import QuantLinear

SHOWN = 3


class PassedOver(NamedTuple):
    """One parameter, or one layer, that stays in float."""

    path: str
    kind: str
    weights: int

    def excluded(self, patterns: Collection[str]) -> bool:
        """Whether a pattern means it, or the module that holds it."""
        return any(matches(pattern, path) for pattern in patterns for path in self.paths)

    @property
    def paths(self) -> tuple[str, str]:
        """Its own path, and that of the module that holds it: a pattern may mean either."""
        return self.path, self.path.rpartition(".")[0]


def passed_over(root: nn.Module, found: Collection[nn.Module]) -> list[PassedOver]:
    """Stacks of matrices, and subclasses of ``nn.Linear`` that are not among those ``found``; routers stay anyway."""
    return [*_stacks(root), *_subclasses(root, found)]


def _stacks(root: nn.Module) -> Iterator[PassedOver]:
    for path, stack in stacks(root):
        owner = path.partition(".parametrizations.")[0]  # a weight norm keeps a convolution's kernel there
        if owner != path and isinstance(root.get_submodule(owner), nn.modules.conv._ConvNd):
            continue
        yield PassedOver(path, f"a stack of {len(stack)} matrices", stack.numel())


def _subclasses(root: nn.Module, found: Collection[nn.Module]) -> Iterator[PassedOver]:
    known = {id(module) for module in (*found, *routers(root).values())}
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in known:
            weights = _size(module)
            yield PassedOver(path, f"{type(module).__name__}, whose forward is not that of nn.Linear", weights)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def warn_passed_over(root: nn.Module, left: Collection[PassedOver], exclude: Collection[str], stacklevel: int) -> None:
    """Warn of what stays in float and is not excluded; ``stacklevel`` is what the caller would tell `warnings.warn`."""
    kept = [each for each in left if not each.excluded(exclude)]
    if not kept:
        return
    packed = sum(m.in_features * m.out_features for m in root.modules() if isinstance(m, QuantLinear))
    total = packed + _size(root)
    share = 100 * sum(each.weights for each in kept) / total
    named = ", ".join(f"{each.path} ({each.kind})" for each in kept[:SHOWN])
    more = f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else ""
    advice = [
        "`ptq quantize` on a checkpoint takes experts apart and packs them, and ptq.load of a float checkpoint takes "
        "them apart for quantize_linears"
    ] * any(each.kind.startswith("a stack") for each in kept)
    advice += ["put an nn.Linear in its place"] * any("forward" in each.kind for each in kept)
    warnings.warn(
        f"ptq.quantize_linears packs nn.Linear layers alone; {named}{more} stay in float, {share:.1f} % of the "
        f"module's weights: {'; '.join(advice)}; or name in exclude what is to stay",
        UserWarning,
        stacklevel + 1,
    )
