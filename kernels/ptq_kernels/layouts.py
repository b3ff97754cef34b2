"""How a packed weight may lie in memory, as a small registry.

"canonical" (see bitstream.py) is what is stored and exchanged. Any other layout exists only in memory, because one
implementation reads it faster; it converts to and from canonical exactly, so one copy of a weight is enough.

Conversions are an operator with a fake implementation, so that tensors without memory (on meta, or of a trace) get a
result without memory: the C++ library would follow their addresses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq_kernels import bitstream


class PackedWeight(NamedTuple):
    """One quantized ``[N, K]`` weight: ``scales[n, k // group_size] * (code[n, k] - zeros[n, k // group_size])``."""

    qweight: Tensor  # what `layout` says; canonical: int32 [N, ceil(K * bits / 32)]
    scales: Tensor  # bfloat16, float16 or float32 [N, G]; may be negative; the same in every layout
    zeros: Tensor | None  # uint8 [N, G]; None: 2**(bits-1) everywhere; the same in every layout
    bits: int
    group_size: int  # resolved: K // G
    in_features: int  # K
    layout: str = "canonical"
    perm: Tensor | None = None  # int32 or int64 [K]: column j is for column perm[j] of x; None: for j

    @property
    def out_features(self) -> int:
        """N, the rows of the weight."""
        return self.scales.shape[0]


class Layout(NamedTuple):
    """One way to lay out the codes of a weight."""

    name: str
    storage: Callable[[PackedWeight], tuple[torch.dtype, tuple[int, ...]]]  # of qweight, for validation
    refuse: Callable[[PackedWeight], str | None]  # why this canonical weight cannot take the layout; None: it can
    pack: Callable[[PackedWeight], Tensor]  # canonical weight -> qweight of this layout
    unpack: Callable[[PackedWeight], Tensor]  # weight of this layout -> canonical qweight, exactly


_LAYOUTS: dict[str, Layout] = {}


def register(layout: Layout) -> None:
    """Make a layout known by its name."""
    _LAYOUTS[layout.name] = layout


def names() -> tuple[str, ...]:
    """Every registered layout."""
    return tuple(_LAYOUTS)


def get(name: str) -> Layout:
    """The layout of that name; ValueError names the known ones."""
    if name not in _LAYOUTS:
        raise ValueError(f"layout must be one of {names()}, got {name!r}; convert the weight with ptq_kernels.prepare")
    return _LAYOUTS[name]


def convert(weight: PackedWeight, name: str) -> PackedWeight:
    """The same weight in the layout ``name``; ValueError says why where it does not fit."""
    if weight.layout == name:
        return weight
    target = get(name)
    if weight.layout != "canonical":
        weight = _through_operator(weight, "canonical")
    if name == "canonical":
        return weight
    if reason := target.refuse(weight):
        raise ValueError(f"layout {name!r} cannot hold this weight: {reason}; keep it canonical")
    return _through_operator(weight, name)


def _through_operator(weight: PackedWeight, name: str) -> PackedWeight:
    """To or from the canonical layout."""
    qweight: Tensor = torch.ops.ptq_kernels.convert.default(*weight[:7], name)
    return weight._replace(qweight=qweight, layout=name)


def _convert(*arguments: Any) -> Tensor:
    *parts, target = arguments  # those of a PackedWeight but for its order, as declared below
    weight = PackedWeight(*parts)
    return get(target).pack(weight) if weight.layout == "canonical" else get(weight.layout).unpack(weight)


def _convert_fake(*arguments: Any) -> Tensor:
    *parts, target = arguments
    weight = PackedWeight(*parts)
    dtype, shape = get(target).storage(weight)
    return weight.qweight.new_empty(shape, dtype=dtype)


_LIBRARY = torch.library.Library("ptq_kernels", "FRAGMENT")
_LIBRARY.define(
    "convert(Tensor qweight, Tensor scales, Tensor? zeros,"
    " int bits, int group_size, int in_features, str layout, str target) -> Tensor"
)
torch.library.impl("ptq_kernels::convert", "default", _convert, lib=_LIBRARY)
torch.library.register_fake("ptq_kernels::convert", _convert_fake, lib=_LIBRARY)

register(
    Layout(
        name="canonical",
        storage=lambda w: (torch.int32, (w.out_features, bitstream.words(w.in_features, w.bits))),
        refuse=lambda w: None,
        pack=lambda w: w.qweight,
        unpack=lambda w: w.qweight,
    )
)
