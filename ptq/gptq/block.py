"""GPTQ on one block: group by group in execution order, so that later inputs come from quantized earlier layers."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import InputGroup, InputStats, collect, collect_drift
from ptq.calibration.held import Run
from ptq.distributed import Ranks
from ptq.formats.codec import Scheme
from ptq.gptq.candidates import solve_candidates
from ptq.gptq.descent import descend
from ptq.gptq.solver import Factor, correction, factorize, require_no_rescue
from ptq.grid import Grid, min_max_grid, nearest_codes, values
from ptq.grid_search import search_grid
from ptq.loss import quadratic_loss
from ptq.models.structure import linears, weight_of
from ptq.task import TINY, BlockTask, ModuleResult, Solved, counted, finish


class Choice(NamedTuple):
    """Codes of a weight on a grid and their loss, ``trace(D H D^T)``."""

    codes: Tensor
    grid: Grid
    loss: float


def gptq_block(
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    runs: Sequence[Run],
    task: BlockTask,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, ModuleResult]:
    """Collect, solve and replace, one input group after another.

    ``weights``, float32 ``[N, K]``, are what to solve for where the modules hold them rounded to the model's dtype.
    """
    results: dict[str, ModuleResult] = {}
    where = f"{task.name}." if task.name else ""
    for stage in stages(groups):
        for group, (stats, drift) in zip(stage, _statistics(modules, stage, runs, task, where), strict=True):
            factor = factor_of(stats.hessian, group.members[0], task)
            shift = None if drift is None else _shift(drift, factor, task)
            for name in group.members:
                W = weight_of(modules[name]).float() if weights is None else weights[name]
                results[name] = _gptq_linear(modules[name], W, stats, factor, shift, task, task.schemes[name])
    return results


def stages(groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """Groups that can be calibrated in one pass, in order: the same Linears of all experts, every other group alone."""
    found: dict[tuple[object, ...], list[InputGroup]] = {}
    for index, group in enumerate(groups):
        leaves = tuple(member.rpartition(".")[2] for member in group.members)
        found.setdefault((index,) if group.pool is None else (group.pool, *leaves), []).append(group)
    return list(found.values())


def _statistics(
    modules: Mapping[str, nn.Module], stage: Sequence[InputGroup], runs: Sequence[Run], task: BlockTask, where: str
) -> list[tuple[InputStats, Tensor | None]]:
    """Second moment of each input and, with a float twin, how far it has drifted from the float model's.

    Experts have no drift: a router that decides differently gives the two models different tokens.
    """
    group = stage[0]
    if task.twin is None or group.pool is not None:
        return [(stats, None) for stats in collect(modules, stage, runs, where, task.ranks)]
    head = group.members[0]
    float_module = dict(linears(task.twin.block))[head]
    pairs = zip(runs, task.twin.runs, strict=True)
    return [collect_drift(modules[head], float_module, group.calls, pairs, where + head, task.ranks)]


def _shift(drift: Tensor, factor: Factor, task: BlockTask) -> Tensor:
    """`correction`, each process computing some of its rows."""
    ranks, features = task.ranks, len(drift)
    return ranks.stack(correction(drift[ranks.rows(features)], factor, task.config.gptq.correct_inputs), features)


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
    if not len(W):  # more processes than rows
        return Choice(W.to(torch.uint8), min_max_grid(W, scheme, scale_dtype=task.scale_dtype), 0.0)
    if settings.scales == "hessian":
        grid = search_grid(W, H.diagonal() + factor.lam, scheme, scale_dtype=task.scale_dtype)
    else:
        grid = min_max_grid(W, scheme, scale_dtype=task.scale_dtype)
    size = settings.block_size
    codes, grid = solve_candidates(
        W, factor, grid, settings.candidates, scale_dtype=task.scale_dtype, block_size=size
    )  # fmt: skip
    if settings.sweeps:
        codes = descend(W, codes, H, factor, grid, sweeps=settings.sweeps, block_size=size)
    return Choice(codes, grid, quadratic_loss(W - values(codes, grid), H))


def whole(part: Choice, rows: int, ranks: Ranks) -> Choice:
    """What all processes chose, each for its part of ``rows`` rows."""
    codes, scales, zeros = (ranks.stack(each, rows) for each in (part.codes, part.grid.scales, part.grid.zeros))
    return Choice(codes, part.grid._replace(scales=scales, zeros=zeros), ranks.total(part.loss)[0])


@torch.no_grad()
def _gptq_linear(
    module: nn.Module,
    W_NK: Tensor,
    stats: InputStats,
    factor: Factor,
    shift: Tensor | None,
    task: BlockTask,
    scheme: Scheme,
) -> ModuleResult:
    started = time.perf_counter()
    W = W_NK[task.ranks.rows(len(W_NK))]  # rows do not depend on each other
    # What the codes should give on the inputs they will see.
    target = W if shift is None else W.addmm(W, shift)
    choice = choose_codes(target, stats.hessian, factor, scheme, task)
    plain = min_max_grid(W, scheme, scale_dtype=task.scale_dtype)
    rounded = nearest_codes(W, plain)
    other = Choice(rounded, plain, quadratic_loss(target - values(rounded, plain), stats.hessian))
    loss, rounding, energy = task.ranks.total(choice.loss, other.loss, quadratic_loss(target, stats.hessian))
    energy = max(energy, TINY)
    solver, rescues = "gptq", list(factor.rescues)
    if loss > rounding:  # possible with few tokens; the better codes are kept and counted
        choice, solver = other, "rtn"
        rescues.append("rounding was better")
    choice = whole(choice, len(W_NK), task.ranks)
    row: dict[str, object] = {
        "solver": solver,
        **counted(stats),
        "damping": factor.damping,
        "dead_inputs": factor.dead,
        "rescues": rescues,
    }
    return finish(module, Solved(choice.codes, choice.grid, choice.loss / energy, rounding / energy), row, started)
