"""Which implementation runs, and the record of what has run."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels import layouts, reference, tiles
from ptq_kernels.cpu import library
from ptq_kernels.cpu import matmul as cpu
from ptq_kernels.layouts import PackedWeight

_log = logging.getLogger("ptq_kernels")


class Implementation(NamedTuple):
    """One way to compute the product."""

    layouts: tuple[str, ...]  # that it reads, fastest first
    refuse: Callable[[torch.device], str | None]  # why it cannot run there; None: it can
    run: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]  # x [M, K] with M >= 1, contiguous -> [M, N]
    describe: Callable[[PackedWeight], str]  # what it does with such a weight, for the log and the report
    gathers: bool = False  # it follows `perm` of the weight itself; otherwise x is gathered before


@cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}; pip install triton)"
    return None


def _refuse_triton(device: torch.device) -> str | None:
    if reason := _triton_missing():
        return reason
    from ptq_kernels.triton import w4a16

    return w4a16.refuse(device)


def _run_triton(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    from ptq_kernels.triton import launch

    return launch.matmul(x, weight, bias)


def _describe_triton(weight: PackedWeight) -> str:
    from ptq_kernels.triton import launch

    return launch.describe(weight)


def _refuse_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it needs CPU tensors, got {device}"


def _forced(name: str) -> Implementation:
    """One instruction set of the CPU, whichever is fastest."""
    return Implementation(
        ("strips", "canonical"),
        lambda device: _refuse_cpu(device) or library.refuse(name),
        cpu.by_library(name),
        lambda weight: f"C++ library for {name}",
    )


_IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(
        ("canonical",),
        lambda device: None,
        reference.matmul,
        lambda weight: "float32 dequantize and matmul",
        gathers=True,
    ),
    "triton": Implementation((*tiles.NAMES, "canonical"), _refuse_triton, _run_triton, _describe_triton, gathers=True),
    "cpu": Implementation(("strips", "aten_int4", "canonical"), _refuse_cpu, cpu.matmul, cpu.describe),
    "cpu-torch": Implementation(("aten_int4", "canonical"), _refuse_cpu, cpu.by_torch, cpu.describe),
    **{f"cpu-{name}": _forced(name) for name in library.SETS},
}


class Strips(NamedTuple):
    """What an implementation does with a weight in layout "strips" besides."""

    with_activation: Callable[[Tensor, PackedWeight, Tensor | None, str], Tensor]
    refuse_int8: Callable[[PackedWeight], str | None]  # why it cannot multiply rows in 8 bits; None: it can


_STRIPS = {
    "cpu": Strips(cpu.with_activation(None), cpu.int8_refusal(None)),
    **{f"cpu-{name}": Strips(cpu.with_activation(name), cpu.int8_refusal(name)) for name in library.SETS},
}

_chosen: dict[tuple[str, str, int, str], str] = {}


def names() -> tuple[str, ...]:
    """Every implementation that can be asked for, besides "auto"."""
    return tuple(_IMPLEMENTATIONS)


@contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """A dict that has, at the end, what `chosen` would say had nothing run before."""
    before, found = dict(_chosen), dict[str, str]()
    _chosen.clear()
    try:
        yield found
    finally:
        found.update(chosen())
        _chosen.update(before)


def chosen() -> dict[str, str]:
    """What has run so far, as ``{"cpu on cpu, 4 bits, layout canonical": how}``."""
    return {_words(*key): how for key, how in _chosen.items()}


def foreseen(
    out_features: int, in_features: int, *, bits: int, group_size: int, symmetric: bool, device: torch.device
) -> tuple[str, str]:
    """What would run for a weight of this shape once it is prepared: an entry of `chosen`, without such a weight."""
    none = torch.empty((), device=device)  # a place, not memory: all that is asked of the tensors
    scales = none.expand(out_features, in_features // group_size)
    weight = PackedWeight(none, scales, None if symmetric else scales, bits, group_size, in_features)
    name = choose("auto", device)
    weight = weight._replace(layout=fastest_layout(name, weight))
    return _words(name, device.type, bits, weight.layout), _IMPLEMENTATIONS[name].describe(weight)


def _words(name: str, device: str, bits: int, layout: str) -> str:
    return f"{name} on {device}, {bits} bits, layout {layout}"


def check_name(impl: str) -> None:
    """Raise ValueError for an unknown implementation."""
    if not isinstance(impl, str) or (impl != "auto" and impl not in _IMPLEMENTATIONS):
        raise ValueError(f"impl must be 'auto' or one of {names()}, got {impl!r}; use 'auto' if in doubt")


def choose(impl: str, device: torch.device) -> str:
    """The implementation for `device`; RuntimeError with the reason where an explicit one cannot run."""
    check_name(impl)
    if impl == "auto":
        if device.type == "cuda":
            return "reference" if _IMPLEMENTATIONS["triton"].refuse(device) else "triton"
        return "cpu" if device.type == "cpu" else "reference"
    if reason := _IMPLEMENTATIONS[impl].refuse(device):
        raise RuntimeError(f"impl={impl!r} cannot run here: {reason}; use impl='auto' or move the tensors")
    return impl


def fastest_layout(impl: str, weight: PackedWeight) -> str:
    """The first layout of the chosen implementation that the canonical `weight` fits."""
    candidates = _IMPLEMENTATIONS[impl].layouts
    return next(name for name in candidates if layouts.get(name).refuse(weight) is None)


def refuse_activation(impl: str, weight: PackedWeight, activation: str | None) -> None:
    """RuntimeError, with the reason, where rows cannot be rounded to `activation` with this weight."""
    name = choose(impl, weight.qweight.device)
    if activation is None or impl == "reference":
        return
    if name in _STRIPS:
        reason = _STRIPS[name].refuse_int8(weight)
    else:
        reason = f"{name!r} has no such product, 'cpu' and, as the specification, 'reference' have"
    if reason:
        raise RuntimeError(f"activation={activation!r} cannot run here with impl={impl!r}: {reason}; or leave it out")


def is_best(impl: str) -> bool:
    """Whether the fastest C++ library serves weights in layout "strips" on the CPU, as `ptq_kernels::strips` does."""
    return choose(impl, torch.device("cpu")) == "cpu" and library.best() is not None


def run(impl: str, x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """``x [M, K] @ weight.T + bias`` with M >= 1, by the implementation chosen, converting a layout it cannot read."""
    name = choose(impl, x.device)
    if activation is not None:
        refuse_activation(impl, weight, activation)
        _note(impl, name, weight, activation)
        if name == "reference":
            return reference.matmul_int8(x, weight, bias)
        rows = x if weight.perm is None else x.index_select(1, weight.perm)
        return _STRIPS[name].with_activation(rows, weight, bias, activation)
    if weight.layout not in _IMPLEMENTATIONS[name].layouts:
        weight = layouts.convert(weight, "canonical")
    _note(impl, name, weight)
    if weight.perm is not None and not _IMPLEMENTATIONS[name].gathers:
        x, weight = x.index_select(1, weight.perm), weight._replace(perm=None)
    return _IMPLEMENTATIONS[name].run(x, weight, bias)


def warmup(impl: str, weight: PackedWeight, dtype: torch.dtype, has_bias: bool) -> None:
    """Make ready what `run` needs for such a weight and rows of `dtype`."""
    name = choose(impl, weight.qweight.device)
    if name != "triton":
        return
    if weight.layout not in _IMPLEMENTATIONS[name].layouts:
        weight = layouts.convert(weight, "canonical")
    from ptq_kernels.triton import launch

    launch.warmup(weight, dtype, has_bias)


def grad_input(grad: Tensor, weight: PackedWeight) -> Tensor:
    """``grad [M, N] @ weight``: by Triton where it reads the layout, otherwise as the specification does it."""
    if weight.perm is not None:
        sorted_grad = grad_input(grad, weight._replace(perm=None))
        return torch.empty_like(sorted_grad).index_copy_(1, weight.perm.long(), sorted_grad)
    if weight.layout in tiles.NAMES and _refuse_triton(grad.device) is None:
        from ptq_kernels.triton import launch

        return launch.grad_input(grad.contiguous(), weight)
    return reference.grad_input(grad, weight)


def _note(impl: str, name: str, weight: PackedWeight, activation: str | None = None) -> None:
    layout = weight.layout if activation is None else f"{weight.layout}, {activation} activations"
    key = (name, weight.scales.device.type, weight.bits, layout)
    if key not in _chosen:
        _chosen[key] = _IMPLEMENTATIONS[name].describe(weight)
        _log.info("impl=%r runs as %s on %s for %d bits, layout %s: %s", impl, *key, _chosen[key])
