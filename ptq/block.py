"""Quantizing one block: trace it, let the method collect, solve and put the codes' values in, then refine them.

A block is any module with Linears: a decoder block of a streamed model, or a whole plain PyTorch module.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ptq.awq.block import awq_block
from ptq.calibration.capture import trace_groups
from ptq.calibration.held import Run, let_go
from ptq.errors import NumericsError, UnsupportedModelError
from ptq.gptq.block import gptq_block
from ptq.grid import LARGEST_SCALE, SMALLEST_SCALE, check_finite, grouped
from ptq.half_products import plain_products
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

    Raises:
        NumericsError: weights that are not finite or larger than any scale reaches, before anything is changed.
    """
    modules = {path: module for path, module in linears(block) if path in task.schemes}
    raised = {path: _raised_scales(weight_of(module), path, task) for path, module in modules.items()}
    reference = float_block(block, runs, task) if task.config.refine.steps else None
    results = _solve(block, modules, runs, task)
    if reference is not None:
        let_go(runs)
        results = refine_block(block, runs, reference, results, task)
    return {path: _with_rescue(result, raised[path]) for path, result in results.items()}


@torch.no_grad()
def _raised_scales(weight: Tensor, path: str, task: BlockTask) -> str:
    """What to put on record where groups are too small for a scale, which are rounded more coarsely; "" if none is.

    Raises NumericsError, before anything is changed, for weights that no scale reaches, or that are not finite.
    """
    scheme, name = task.schemes[path], task.full(path)
    ends = torch.aminmax(grouped(weight, scheme.columns(weight.shape[1])), dim=-1)
    low, high = ends.min.float().clamp(max=0), ends.max.float().clamp(min=0)
    steps = 2.0**scheme.bits - 1
    # of a symmetric grid, whose 0 is in the middle; another one holds 0 as well, wherever the weights lie
    reach = (2 * torch.maximum(high, -low) if scheme.symmetric else high - low) / steps
    if reach.numel() and not float(reach.max()) <= LARGEST_SCALE:  # NaN is not, either
        check_finite(weight, f"the weight of {name}")
        span = LARGEST_SCALE * steps
        limit = f"at most {span / 2:.3g} in magnitude" if scheme.symmetric else f"within {span:.3g} of each other and 0"
        raise NumericsError(
            f"weights must be {limit} for a scale of {scheme.bits}-bit codes to be a float16 number; {name} has one of "
            f"{float(torch.maximum(high, -low).max()):.3g}: check the checkpoint, or exclude the layer"
        )
    small = int(((reach < SMALLEST_SCALE) & (reach > 0)).sum())
    if not small:
        return ""
    found = f"scales of {small} of {reach.numel()} groups raised to 2**-17"
    if task.config.strict:
        raise NumericsError(
            f"strict: weights must be large enough for scales of at least 2**-17 = 7.6e-06; {name} would have the "
            f"{found}: exclude the layer, or set strict: false"
        )
    return found


def _with_rescue(result: ModuleResult, rescue: str) -> ModuleResult:
    if not rescue:
        return result
    row = {**result.row, "rescues": [*result.row.get("rescues", ()), rescue]}
    codes, zeros = result.quantized.codes, result.quantized.zeros
    if "relative_loss" in row and bool((grouped(codes, result.quantized.group_size) == zeros.unsqueeze(-1)).all()):
        # The weight was not zero and its codes are: all is lost, where the squares of such weights are 0 in float32.
        row |= {"relative_loss": 1.0, "relative_rounding_loss": 1.0, "loss_to_rounding": 1.0}
    return result._replace(row=row)


def _solve(
    block: nn.Module, modules: Mapping[str, nn.Module], runs: Sequence[Run], task: BlockTask
) -> dict[str, ModuleResult]:
    if task.config.method == "rtn":
        return {path: _round(module, task, path) for path, module in modules.items()}
    groups = trace_groups(modules, runs if task.branching else runs[:1])
    if task.config.method == "awq":
        if task.branching:
            _require_in_first(modules, runs)
        return awq_block(block, modules, groups, runs, task)
    return gptq_block(modules, groups, runs, task)


def _require_in_first(modules: Mapping[str, nn.Module], runs: Sequence[Run]) -> None:
    try:
        trace_groups(modules, runs[:1])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"awq proves on the first batch that scales change nothing; {error}, put a batch first that reaches all of "
            "them, or use gptq"
        ) from error


@plain_products()
def _round(module: nn.Module, task: BlockTask, path: str) -> ModuleResult:
    started = time.perf_counter()
    quantized = rtn_solve(weight_of(module), task.schemes[path], scale_dtype=task.scale_dtype)
    set_weight(module, quantized.dequantize())
    return ModuleResult(quantized, {"solver": "rtn", **described(quantized, started)})
