"""Quantizing any PyTorch module, without Hugging Face."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ptq.block import BlockTask, ModuleResult, quantize_block
from ptq.config import AWQConfig, GPTQConfig, RunConfig, scheme_for, unused_patterns
from ptq.errors import ConfigError
from ptq.grid import resolve_group_size
from ptq.models.structure import linears, weight_shape
from ptq.nn.swap import replace_module, to_quant_linear

METHODS = ("gptq", "awq", "rtn")


def quantize_linears(
    module: nn.Module,
    calibration_batches: Iterable[Any] = (),
    *,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    exclude: Iterable[str] = (),
    gptq: GPTQConfig | None = None,
    awq: AWQConfig | None = None,
) -> dict[str, dict[str, object]]:
    """Quantize the ``nn.Linear`` layers of a module in place: each becomes a `ptq.nn.QuantLinear`.

    Args:
        module: any module; it is run on the calibration batches, once for each group of layers that share an input, so
            that later layers are calibrated on what the quantized earlier ones put out.
        calibration_batches: arguments of ``module``: a tensor, a tuple (positional) or a dict (keywords) each.
        method: ``gptq``, ``awq`` or ``rtn`` (which needs no batches).
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; -1: all of a row.
        symmetric: keep the zero point in the middle.
        exclude: path patterns of layers to leave alone (see `ptq.config.matches`).
        gptq: options of that method.
        awq: options of that method.

    Returns:
        For each quantized layer's path its losses and settings.

    Raises:
        ConfigError: an unknown method, bits or pattern; a group size that does not divide a layer; no batches.
        NumericsError: NaN or infinity in weights or activations.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; found {method!r}")
    if bits not in (2, 3, 4, 8):
        raise ConfigError(f"bits must be 2, 3, 4 or 8; found {bits!r}")
    config = RunConfig(model="", output="", method=method, bits=bits, group_size=group_size, symmetric=symmetric,
                       exclude=tuple(exclude))  # fmt: skip
    config = replace(config, gptq=gptq or config.gptq, awq=awq or config.awq)
    found = dict(linears(module))
    for pattern in unused_patterns(config, found):
        raise ConfigError(f"a pattern in exclude must match a Linear; {pattern!r} matches none of {', '.join(found)}")
    schemes = {path: s for path in found if (s := scheme_for(config, path)) is not None}
    if not schemes:
        raise ConfigError(f"the module must hold a Linear that is not excluded; {type(module).__name__} holds none")
    for path, scheme in schemes.items():
        resolve_group_size(scheme, weight_shape(found[path])[1], path)
    batches = list(calibration_batches)
    if method != "rtn" and not batches:
        raise ConfigError(f"method {method} needs calibration batches; found none: pass them, or use method='rtn'")
    training = module.training
    module.eval()
    with torch.no_grad():
        runs = [_runner(module, batch) for batch in batches]
        dtype = next(iter(found.values())).weight.dtype
        assert isinstance(dtype, torch.dtype)
        results = quantize_block(module, runs, BlockTask("", schemes, config, dtype))
    _swap(module, found, results)
    module.train(training)
    return {path: result.row for path, result in results.items()}


def _runner(module: nn.Module, batch: Any) -> Callable[[], Any]:
    if isinstance(batch, Mapping):
        return lambda: module(**batch)
    if isinstance(batch, tuple | list):
        return lambda: module(*batch)
    return lambda: module(batch)


def _swap(module: nn.Module, found: Mapping[str, nn.Module], results: Mapping[str, ModuleResult]) -> None:
    for path, result in results.items():
        old = found[path]
        bias = old.bias
        device = old.weight.device
        new = to_quant_linear(result.quantized, bias if isinstance(bias, torch.Tensor) else None)
        assert isinstance(device, torch.device)
        replace_module(module, path, new.to(device).prepare_())
