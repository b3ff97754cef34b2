"""Quantizing one block: trace it, let the method collect, solve and put the codes' values in, then refine them.

A block is any module with Linears: a decoder block of a streamed model, or a whole plain PyTorch module.
"""

import time
from collections.abc import Sequence

from torch import nn

from ptq.awq.block import awq_block
from ptq.calibration.capture import trace_groups
from ptq.calibration.held import Run, let_go
from ptq.gptq.block import gptq_block
from ptq.models.structure import linears, set_weight, weight_of
from ptq.refine import float_block, refine_block
from ptq.rtn import rtn_solve
from ptq.task import BlockTask, ModuleResult, described


def quantize_block(block: nn.Module, runs: Sequence[Run], task: BlockTask) -> dict[str, ModuleResult]:
    """Quantize the Linears of a block and leave the dequantized weights in it.

    Args:
        block: module with real weights; its Linears are overwritten with the values of their codes.
        runs: one call a calibration batch, each running the block.
        task: schemes and settings.

    Returns:
        A result for each Linear in ``task.schemes``, by its path below the block, in execution order.
    """
    if not task.config.refine.steps:
        return _solve(block, runs, task)
    reference = float_block(block, runs, task)
    results = _solve(block, runs, task)
    let_go(runs)
    return refine_block(block, runs, reference, results, task)


def _solve(block: nn.Module, runs: Sequence[Run], task: BlockTask) -> dict[str, ModuleResult]:
    modules = {path: module for path, module in linears(block) if path in task.schemes}
    if task.config.method == "rtn":
        return {path: _round(module, task, path) for path, module in modules.items()}
    groups = trace_groups(modules, runs[0])
    if task.config.method == "awq":
        return awq_block(block, modules, groups, runs, task)
    return gptq_block(modules, groups, runs, task)


def _round(module: nn.Module, task: BlockTask, path: str) -> ModuleResult:
    started = time.perf_counter()
    quantized = rtn_solve(weight_of(module), task.schemes[path], scale_dtype=task.scale_dtype)
    set_weight(module, quantized.dequantize())
    return ModuleResult(quantized, {"solver": "rtn", **described(quantized, started)})
