"""Which implementation runs, and the record of what has run."""

import importlib
import logging
from collections.abc import Callable
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
        ("canonical",), lambda device: None, reference.matmul, lambda weight: "float32 dequantize and matmul"
    ),
    "triton": Implementation((*tiles.NAMES, "canonical"), _refuse_triton, _run_triton, _describe_triton),
    "cpu": Implementation(("strips", "aten_int4", "canonical"), _refuse_cpu, cpu.matmul, cpu.describe),
    "cpu-torch": Implementation(("aten_int4", "canonical"), _refuse_cpu, cpu.by_torch, cpu.describe),
    **{f"cpu-{name}": _forced(name) for name in library.SETS},
}

_chosen: dict[tuple[str, str, int, str], str] = {}


def names() -> tuple[str, ...]:
    """Every implementation that can be asked for, besides "auto"."""
    return tuple(_IMPLEMENTATIONS)


def chosen() -> dict[str, str]:
    """What has run so far, as ``{"cpu on cpu, 4 bits, layout canonical": how}``."""
    return {
        f"{name} on {device}, {bits} bits, layout {layout}": how
        for (name, device, bits, layout), how in _chosen.items()
    }


def check_name(impl: str) -> None:
    """Raise ValueError for an unknown implementation."""
    if impl != "auto" and impl not in _IMPLEMENTATIONS:
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


def run(impl: str, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias`` with M >= 1, by the implementation chosen, converting a layout it cannot read."""
    name = choose(impl, x.device)
    if weight.layout not in _IMPLEMENTATIONS[name].layouts:
        weight = layouts.convert(weight, "canonical")
    _note(impl, name, weight)
    return _IMPLEMENTATIONS[name].run(x, weight, bias)


def grad_input(grad: Tensor, weight: PackedWeight) -> Tensor:
    """``grad [M, N] @ weight``: by Triton where it reads the layout, otherwise as the specification does it."""
    if weight.layout in tiles.NAMES and _refuse_triton(grad.device) is None:
        from ptq_kernels.triton import launch

        return launch.grad_input(grad.contiguous(), weight)
    return reference.grad_input(grad, weight)


def _note(impl: str, name: str, weight: PackedWeight) -> None:
    key = (name, weight.scales.device.type, weight.bits, weight.layout)
    if key not in _chosen:
        _chosen[key] = _IMPLEMENTATIONS[name].describe(weight)
        _log.info("impl=%r runs as %s on %s for %d bits, layout %s: %s", impl, *key, _chosen[key])
