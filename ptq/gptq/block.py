"""GPTQ on one block: group by group in execution order, so that later inputs come from quantized earlier layers."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import InputGroup, InputStats, Run, collect, collect_drift
from ptq.formats.codec import Scheme
from ptq.gptq.descent import descend
from ptq.gptq.solver import Factor, correction, factorize, gptq_solve, require_no_rescue
from ptq.grid import Grid, min_max_grid, nearest_codes, values
from ptq.grid_search import search_grid
from ptq.loss import quadratic_loss
from ptq.models.structure import linears, weight_of
from ptq.task import TINY, BlockTask, ModuleResult, Solved, finish


class Choice(NamedTuple):
    """Codes of a weight on a grid and their loss, ``trace(D H D^T)``."""

    codes: Tensor
    grid: Grid
    loss: float


def gptq_block(
    modules: Mapping[str, nn.Module], groups: Sequence[InputGroup], runs: Sequence[Run], task: BlockTask
) -> dict[str, ModuleResult]:
    """Collect, solve and replace, one input group after another."""
    results: dict[str, ModuleResult] = {}
    where = f"{task.name}." if task.name else ""
    for group in groups:
        stats, drift = _statistics(modules, group, runs, task, where)
        factor = factor_of(stats.hessian, group.members[0], task)
        shift = None if drift is None else correction(drift, factor, task.config.gptq.correct_inputs)
        for name in group.members:
            results[name] = _gptq_linear(modules[name], name, stats, factor, shift, task)
    return results


def _statistics(
    modules: Mapping[str, nn.Module], group: InputGroup, runs: Sequence[Run], task: BlockTask, where: str
) -> tuple[InputStats, Tensor | None]:
    """Second moment of a group's input and, with a float twin, how far the input has drifted from the float model's."""
    if task.twin is None:
        return collect(modules, [group], runs, where)[0], None
    head = group.members[0]
    float_module = dict(linears(task.twin.block))[head]
    pairs = zip(runs, task.twin.runs, strict=True)
    return collect_drift(modules[head], float_module, group.calls, pairs, where + head)


def factor_of(hessian: Tensor, member: str, task: BlockTask) -> Factor:
    """Factorise a Hessian as configured; under ``strict`` a rescue is an error."""
    settings = task.config.gptq
    factor = factorize(hessian, damping=settings.damping, activation_order=settings.activation_order)
    if task.config.strict:
        require_no_rescue(factor, task.full(member))
    return factor


def choose_codes(W: Tensor, H: Tensor, factor: Factor, scheme: Scheme, task: BlockTask) -> Choice:
    """GPTQ, then coordinate descent, on the grid that the configuration asks for."""
    settings = task.config.gptq
    if settings.scales == "hessian":
        grid = search_grid(W, H.diagonal() + factor.lam, scheme, scale_dtype=task.scale_dtype)
    else:
        grid = min_max_grid(W, scheme, scale_dtype=task.scale_dtype)
    solved = gptq_solve(W, factor, grid, block_size=settings.block_size)
    codes, loss = solved.codes, solved.loss
    if settings.sweeps:
        codes = descend(W, codes, H, factor, grid, sweeps=settings.sweeps, block_size=settings.block_size)
    if settings.sweeps or "diagonal" in factor.rescues:  # the solver's own figure holds for its own codes and factor
        loss = quadratic_loss(W - values(codes, grid), H)
    return Choice(codes, grid, loss)


@torch.no_grad()
def _gptq_linear(
    module: nn.Module, name: str, stats: InputStats, factor: Factor, shift: Tensor | None, task: BlockTask
) -> ModuleResult:
    started = time.perf_counter()
    W = weight_of(module).float()
    # What the codes should give on the inputs they will see.
    target = W if shift is None else W.addmm(W, shift)
    choice = choose_codes(target, stats.hessian, factor, task.schemes[name], task)
    plain = min_max_grid(W, task.schemes[name], scale_dtype=task.scale_dtype)
    rounded = nearest_codes(W, plain)
    rounding = quadratic_loss(target - values(rounded, plain), stats.hessian)
    solver, rescues = "gptq", list(factor.rescues)
    if choice.loss > rounding:  # possible with few tokens; the better codes are kept and counted
        choice, solver = Choice(rounded, plain, rounding), "rtn"
        rescues.append("rounding was better")
    energy = max(quadratic_loss(target, stats.hessian), TINY)
    row: dict[str, object] = {
        "solver": solver,
        "tokens": stats.tokens,
        "damping": factor.damping,
        "dead_inputs": factor.dead,
        "rescues": rescues,
    }
    return finish(module, Solved(choice.codes, choice.grid, choice.loss / energy, rounding / energy), row, started)
