"""GPTQ on one block: group by group in execution order, so that later inputs come from quantized earlier layers."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import InputGroup, InputStats, collect, collect_drift
from ptq.calibration.held import Run
from ptq.distributed import Ranks
from ptq.formats.codec import Scheme
from ptq.gptq.candidates import solve_candidates
from ptq.gptq.descent import descend
from ptq.gptq.outputs import BLOCK, output_loss, solve_by_parts
from ptq.gptq.solver import Factor, correction, factorize, require_no_rescue
from ptq.grid import Grid, min_max_grid, nearest_codes, values
from ptq.grid_search import search_grid
from ptq.half_products import plain_products
from ptq.loss import quadratic_loss
from ptq.models.structure import weight_of
from ptq.squares import times
from ptq.task import CHUNK_WEIGHTS, BlockTask, ModuleResult, Solved, counted, faint, finish, share


class Choice(NamedTuple):
    """Codes of a weight on a grid and their loss, ``trace(D H D^T)``."""

    codes: Tensor
    grid: Grid
    loss: float


class Drift(NamedTuple):
    """How far an input has drifted from the float model's: C, or what each Linear that reads it makes of C."""

    whole: Tensor | None  # float32 [K, K], where that has fewer rows than
    of: dict[str, Tensor]  # W C, float32 [N, K], by Linear


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
    if weights is None:
        weights = {name: weight_of(module) for name, module in modules.items()}
    parts = {name: W[task.ranks.rows(len(W))] for name, W in weights.items()}  # rows do not depend on each other
    for stage in stages(groups):
        found = _statistics(modules, stage, parts, runs, task)
        for group in stage:
            results |= _solve_group({name: modules[name] for name in group.members}, parts, *found.pop(0), task)
    return results


@plain_products()
def _solve_group(
    modules: Mapping[str, nn.Module],
    parts: Mapping[str, Tensor],
    stats: InputStats,
    drift: Drift | None,
    task: BlockTask,
) -> dict[str, ModuleResult]:
    """The Linears that read one input; Hessian and factor end with it."""
    name, module = next(iter(modules.items()))
    device = weight_of(module).device
    factor = factor_of(stats.hessian, name, task, device)
    shift = None if drift is None else _shift(drift, factor, task, device)
    return {
        name: _gptq_linear(module, name, parts[name], stats, factor, shift, task) for name, module in modules.items()
    }


def stages(groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """Groups that can be calibrated in one pass, in order: the same Linears of all experts, every other group alone."""
    found: dict[tuple[object, ...], list[InputGroup]] = {}
    for index, group in enumerate(groups):
        leaves = tuple(member.rpartition(".")[2] for member in group.members)
        found.setdefault((index,) if group.pool is None else (group.pool, *leaves), []).append(group)
    return list(found.values())


def _statistics(
    modules: Mapping[str, nn.Module],
    stage: Sequence[InputGroup],
    parts: Mapping[str, Tensor],
    runs: Sequence[Run],
    task: BlockTask,
) -> list[tuple[InputStats, Drift | None]]:
    """Second moment of each input and, with a float twin, its drift.

    Experts have no drift: a router that decides differently gives the two models different tokens.
    """
    group = stage[0]
    if task.twin is None or group.pool is not None:
        return [(stats, None) for stats in collect(modules, stage, runs, task.full(""), task.ranks, task.home)]
    head = group.members[0]
    float_module, pairs = task.twin.block.get_submodule(head), zip(runs, task.twin.runs, strict=True)
    stats, drift = collect_drift(
        modules[head], float_module, group.calls, pairs, task.full(head), task.ranks, task.home
    )
    if drift is None:
        return [(stats, None)]
    # A wide C ends here, before there is a factor beside the Hessian.
    if sum(len(parts[name]) for name in group.members) >= len(drift):
        return [(stats, Drift(drift, {}))]
    return [(stats, Drift(None, {name: _times_drift(parts[name], drift) for name in group.members}))]


def _times_drift(W_NK: Tensor, drift_KK: Tensor) -> Tensor:
    parts = [times(rows.float(), drift_KK).to(drift_KK.device) for rows in W_NK.split(_rows_at_once(W_NK))]
    return torch.cat(parts)


def _rows_at_once(W_NK: Tensor) -> int:
    return max(1, CHUNK_WEIGHTS // W_NK.shape[1])


def _shift(drift: Drift, factor: Factor, task: BlockTask, device: torch.device) -> Drift:
    """What to add to the weights, in the place of the drift: all of C shared out between the processes."""
    ranks, strength = task.ranks, task.config.gptq.correct_inputs
    if drift.whole is None:
        return Drift(None, {name: correction(product, factor, strength, device) for name, product in drift.of.items()})
    features = len(drift.whole)
    part = correction(drift.whole[ranks.rows(features)], factor, strength, device)
    return Drift(ranks.stack(part, features), {})


def _target(W_NK: Tensor, name: str, shift: Drift | None, rows: slice) -> Tensor:
    """What the codes should give on the inputs they will see."""
    if shift is None:
        return W_NK
    return W_NK + (shift.of[name][rows].to(W_NK.device) if shift.whole is None else times(W_NK, shift.whole))


def factor_of(hessian: Tensor, member: str, task: BlockTask, device: torch.device | None = None) -> Factor:
    """Factorise a Hessian as configured, on ``device``; under ``strict`` a rescue is an error."""
    settings = task.config.gptq
    factor = factorize(hessian, damping=settings.damping, activation_order=settings.activation_order, device=device)
    if task.config.strict:
        require_no_rescue(factor, task.full(member))
    return factor


def choose_codes(W: Tensor, H: Tensor, factor: Factor, scheme: Scheme, task: BlockTask) -> Choice:
    """GPTQ, then coordinate descent, on the grid that the configuration asks for."""
    settings = task.config.gptq
    if not len(W):  # more processes than rows
        return Choice(W.to(torch.uint8), min_max_grid(W, scheme, scale_dtype=task.scale_dtype), 0.0)
    if settings.scales == "hessian":
        importance = (H.diagonal() + factor.lam).to(W.device)
        grid = search_grid(W, importance, scheme, scale_dtype=task.scale_dtype)
    else:
        grid = min_max_grid(W, scheme, scale_dtype=task.scale_dtype)
    size = settings.block_size
    codes, grid = solve_candidates(W, factor, grid, settings.candidates, scale_dtype=task.scale_dtype, block_size=size)
    codes, loss = descend(W, codes, H, factor, grid, sweeps=settings.sweeps, block_size=size)
    return Choice(codes, grid, loss)


def whole(part: Choice, rows: int, ranks: Ranks) -> Choice:
    """What all processes chose, each for its part of ``rows`` rows."""
    codes, scales, zeros = (ranks.stack(each, rows) for each in (part.codes, part.grid.scales, part.grid.zeros))
    return Choice(codes, part.grid._replace(scales=scales, zeros=zeros), ranks.total(part.loss)[0])


@torch.no_grad()
def _gptq_linear(
    module: nn.Module, name: str, part: Tensor, stats: InputStats, factor: Factor, shift: Drift | None, task: BlockTask
) -> ModuleResult:
    """Solve this process's part of a weight and put the values of all parts in."""
    started, too_small = time.perf_counter(), faint(stats, task.full(name), task.config.strict)
    found = _solved(name, part, stats.hessian, factor, shift, task)
    choice, other = found.solved, found.rounded
    loss, rounding, energy = task.ranks.total(choice.loss, other.loss, found.energy)
    solver, rescues = "gptq", [*too_small, *factor.rescues, *found.rescues]
    if loss > rounding:  # possible with few tokens; the better codes are kept and counted
        choice, solver = other, "rtn"
        rescues.append("rounding was better")
    choice = whole(choice, len(weight_of(module)), task.ranks)
    row: dict[str, Any] = {
        "solver": solver,
        **counted(stats),
        "damping": factor.damping,
        "dead_inputs": factor.dead,
        "rescues": rescues,
    }
    losses = share(choice.loss, energy), share(rounding, energy)
    return finish(module, Solved(choice.codes, choice.grid, *losses), row, started)


class _Found(NamedTuple):
    """Codes of a weight, those of the weight rounded, and the loss that all of it would be."""

    solved: Choice
    rounded: Choice
    energy: float
    rescues: list[str]


def _solved(name: str, part: Tensor, H: Tensor, factor: Factor, shift: Drift | None, task: BlockTask) -> _Found:
    """Some rows at a time; where it is known how outputs meet again, whole blocks of them."""
    moments = [] if task.moments is None else task.moments(name)
    rescues = []
    if task.moments is not None and not any(bool(each.any()) for each in moments):
        # As of an expert that no token reached, or of scores of which only the order counts.
        moments, rescues = [], ["no gradient came to its outputs"]
    size = _rows_at_once(part)
    if moments:
        size = max(1, size // BLOCK) * BLOCK
    solved, plainly, energy = [], [], 0.0
    for start in range(0, max(1, len(part)), size):
        rows = slice(start, start + size)
        here = moments[start // BLOCK : (start + size) // BLOCK]
        judge = partial(output_loss, moments=here) if here else quadratic_loss
        W = part[rows].float()
        target = _target(W, name, shift, rows)
        plain = min_max_grid(W, task.schemes[name], scale_dtype=task.scale_dtype)
        rounded = nearest_codes(W, plain)
        energy += judge(target, H)
        plainly.append(Choice(rounded, plain, judge(target - values(rounded, plain), H)))
        choose = partial(choose_codes, H=H, factor=factor, scheme=task.schemes[name], task=task)
        solved.append(_by_outputs(target, here, choose, H) if here else choose(target))
    return _Found(_stacked(solved), _stacked(plainly), energy, rescues)


def _by_outputs(target: Tensor, moments: Sequence[Tensor], choose: Callable[[Tensor], Choice], H: Tensor) -> Choice:
    """Rows that make up for each other; the loss counts what their errors come to at the model's end."""

    def solve(moved: Tensor) -> tuple[Tensor, Choice]:
        choice = choose(moved)
        return values(choice.codes, choice.grid), choice

    rows, parts = zip(*solve_by_parts(target, moments, solve), strict=True)
    choice = _in_rows(_stacked(parts), torch.cat(rows).argsort())
    return choice._replace(loss=output_loss(target - values(choice.codes, choice.grid), H, moments))


def _in_rows(choice: Choice, order: Tensor) -> Choice:
    scales, zeros = choice.grid.scales[order], choice.grid.zeros[order]
    return choice._replace(codes=choice.codes[order], grid=choice.grid._replace(scales=scales, zeros=zeros))


def _stacked(parts: Sequence[Choice]) -> Choice:
    """Choices for some rows each as one."""
    codes, scales, zeros = (
        torch.cat(each) for each in zip(*((p.codes, p.grid.scales, p.grid.zeros) for p in parts), strict=True)
    )
    return Choice(codes, parts[0].grid._replace(scales=scales, zeros=zeros), sum(part.loss for part in parts))
