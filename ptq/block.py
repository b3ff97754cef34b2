"""Quantizing one block: trace it, collect statistics group by group in execution order, solve, put the values in.

A block is any module with Linears: a decoder block of a streamed model, or a whole plain PyTorch module.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import InputGroup, InputStats, Run, collect, trace_groups
from ptq.config import RunConfig
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.gptq.solver import Factor, factorize, gptq_solve, require_no_rescue
from ptq.grid import Grid, min_max_grid, nearest_codes, pack_result, values
from ptq.grid_search import search_grid
from ptq.loss import quadratic_loss, rounding_loss
from ptq.models.structure import linears, set_weight, weight_of
from ptq.rtn import rtn_solve


class ModuleResult(NamedTuple):
    """One quantized Linear and the row it gets in the report."""

    quantized: QuantizedWeight
    row: dict[str, object]


class BlockTask(NamedTuple):
    """What to do to one block."""

    name: str  # dotted path of the block, "" for a whole module
    schemes: Mapping[str, Scheme]  # Linear's path below the block -> how to quantize it
    config: RunConfig
    scale_dtype: torch.dtype
    # Runs a float32 stand-in for the block on the first batch and returns its output; AWQ proves its folds with it.
    probe: Callable[[nn.Module], Tensor] | None = None

    def full(self, member: str) -> str:
        """Dotted path of a Linear in the model."""
        return f"{self.name}.{member}" if self.name else member


# Keeps the relative loss of an all-zero weight defined.
TINY = 1e-30


class Solved(NamedTuple):
    """Codes of one weight; losses relative to the energy of its output, ``trace(W H W^T)``."""

    codes: Tensor
    grid: Grid
    loss: float
    rounding: float  # what plain rounding would lose


def quantize_block(block: nn.Module, runs: Sequence[Run], task: BlockTask) -> dict[str, ModuleResult]:
    """Quantize the Linears of a block and leave the dequantized weights in it.

    Args:
        block: module with real weights; its Linears are overwritten with the values of their codes.
        runs: one call a calibration batch, each running the block.
        task: schemes and settings.

    Returns:
        A result for each Linear in ``task.schemes``, by its path below the block, in execution order.
    """
    modules = {path: module for path, module in linears(block) if path in task.schemes}
    if task.config.method == "rtn":
        return {path: _round(module, task, path) for path, module in modules.items()}
    groups = trace_groups(modules, runs[0])
    if task.config.method == "awq":
        from ptq.awq.block import awq_block

        return awq_block(block, modules, groups, runs, task)
    results: dict[str, ModuleResult] = {}
    for group in groups:
        (stats,) = collect(modules, [group], runs, where=task.name + "." if task.name else "")
        results.update(_gptq_group(modules, group, stats, task))
    return results


def _round(module: nn.Module, task: BlockTask, path: str) -> ModuleResult:
    started = time.perf_counter()
    scheme = task.schemes[path]
    quantized = rtn_solve(weight_of(module), scheme, scale_dtype=task.scale_dtype)
    set_weight(module, quantized.dequantize())
    return ModuleResult(quantized, {"solver": "rtn", **_common(quantized, started)})


def _common(quantized: QuantizedWeight, started: float) -> dict[str, object]:
    return {
        "bits": quantized.bits,
        "group_size": quantized.group_size,
        "symmetric": quantized.symmetric,
        "seconds": round(time.perf_counter() - started, 4),
    }


def _gptq_group(
    modules: Mapping[str, nn.Module], group: InputGroup, stats: InputStats, task: BlockTask
) -> dict[str, ModuleResult]:
    """Solve every Linear that reads one input; the Hessian is factorised once."""
    settings = task.config.gptq
    factor = factorize(stats.hessian, damping=settings.damping, activation_order=settings.activation_order)
    if task.config.strict:
        require_no_rescue(factor, task.full(group.members[0]))
    return {name: _gptq_linear(modules[name], name, stats, factor, task) for name in group.members}


def _gptq_linear(module: nn.Module, name: str, stats: InputStats, factor: Factor, task: BlockTask) -> ModuleResult:
    started = time.perf_counter()
    W = weight_of(module).float()
    plain = min_max_grid(W, task.schemes[name], scale_dtype=task.scale_dtype)
    grid = plain
    if task.config.gptq.scales == "hessian":
        importance = stats.hessian.diagonal() + factor.lam
        grid = search_grid(W, importance, task.schemes[name], scale_dtype=task.scale_dtype)
    solved = gptq_solve(W, factor, grid, block_size=task.config.gptq.block_size)
    rounding = rounding_loss(W, stats.hessian, plain)
    codes, solver, loss = solved.codes, "gptq", solved.loss
    rescues = list(factor.rescues)
    if "diagonal" in rescues:  # the solver saw the diagonal only
        loss = quadratic_loss(W - values(codes, grid), stats.hessian)
    if loss > rounding:  # possible with few tokens; the better codes are kept and counted
        codes, grid, solver, loss = nearest_codes(W, plain), plain, "rtn", rounding
        rescues.append("rounding was better")
    energy = max(quadratic_loss(W, stats.hessian), TINY)
    row: dict[str, object] = {
        "solver": solver,
        "tokens": stats.tokens,
        "damping": factor.damping,
        "dead_inputs": factor.dead,
        "rescues": rescues,
    }
    return finish(module, Solved(codes, grid, loss / energy, rounding / energy), row, started)


def finish(module: nn.Module, solved: Solved, row: dict[str, object], started: float) -> ModuleResult:
    """Put the codes' values into the module and complete its row of the report."""
    quantized = pack_result(solved.codes, solved.grid)
    set_weight(module, quantized.dequantize())
    losses = {
        "relative_loss": solved.loss,
        "relative_rounding_loss": solved.rounding,
        "loss_to_rounding": solved.loss / solved.rounding if solved.rounding > 0 else 1.0,
    }
    return ModuleResult(quantized, {**row, **losses, **_common(quantized, started)})
