"""AWQ on one block: one pass of statistics, scales folded group by group in execution order, clip, round."""

import copy
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ptq.awq.fold import UNCHANGED, Fold, apply_fold, difference, find_folds
from ptq.awq.solver import rescale, search_clip, search_scales
from ptq.calibration.capture import InputGroup, InputStats, Run, collect
from ptq.errors import NumericsError
from ptq.formats.codec import Scheme
from ptq.gptq.block import Choice, choose_codes, factor_of
from ptq.gptq.solver import Factor
from ptq.grid import min_max_grid, nearest_codes, values
from ptq.loss import quadratic_loss, rounding_loss
from ptq.models.structure import weight_of
from ptq.task import TINY, BlockTask, ModuleResult, Solved, finish


@torch.no_grad()
def awq_block(
    block: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    runs: Sequence[Run],
    task: BlockTask,
) -> dict[str, ModuleResult]:
    """Scale, clip and round the Linears of a block; the norms before them take the inverse scales.

    The block's function in float is proven unchanged by the folds before a code is chosen; where the proof fails all
    folds are dropped and the report says so.
    """
    where = f"{task.name}." if task.name else ""
    stats = collect(modules, groups, runs, where)
    scaled = copy.deepcopy(block).float()
    folded, rescues = _fold_all(scaled, groups, stats, task)
    for path in {fold.producer for fold, _ in folded.values()}:
        _take_over(block.get_submodule(path), scaled.get_submodule(path), skip="weight" if path in modules else "")
    results = {}
    for group, input_stats in zip(groups, stats, strict=True):
        fold, scales = folded.get(group.members, (None, None))
        moment = input_stats.hessian if scales is None else rescale(input_stats.hessian, scales)
        factor = factor_of(moment, group.members[0], task) if task.config.awq.codes == "gptq" else None
        for name in group.members:
            weight = weight_of(scaled.get_submodule(name))
            choice = _choose(weight, moment, factor, task.schemes[name], task)
            row: dict[str, object] = {
                "solver": "awq" if factor is None else "awq+gptq",
                "fold": fold.producer if fold else None,
                "tokens": input_stats.tokens,
                "rescues": rescues + ([] if factor is None else list(factor.rescues)),
            }
            results[name] = _awq_linear(modules[name], weight, choice, moment, input_stats.hessian, row)
    return results


def _fold_all(
    scaled: nn.Module, groups: Sequence[InputGroup], stats: Sequence[InputStats], task: BlockTask
) -> tuple[dict[tuple[str, ...], tuple[Fold, Tensor]], list[str]]:
    """Search and apply scales on the float32 block: for each input group that got them, its fold and the scales."""
    if task.probe is None:
        return {}, []
    before = task.probe(scaled)
    originals = {name: p.detach().clone() for name, p in scaled.named_parameters()}
    applied: dict[tuple[str, ...], tuple[Fold, Tensor]] = {}
    for fold in find_folds(scaled, groups, task.probe):
        index = next(i for i, group in enumerate(groups) if group.members == fold.consumers)
        found = search_scales(
            [weight_of(scaled.get_submodule(name)) for name in fold.consumers],
            stats[index].hessian,
            stats[index].magnitude,
            [task.schemes[name] for name in fold.consumers],
            grid=task.config.awq.grid,
            clip=task.config.awq.clip,
            scale_dtype=task.scale_dtype,
            tied=fold.rows - fold.rows.min(),
        )
        applied[fold.consumers] = fold, apply_fold(scaled, fold, found.scales, task.scale_dtype)
    error = difference(task.probe(scaled), before)
    if error < UNCHANGED:
        return applied, []
    if task.config.strict:
        raise NumericsError(
            f"strict: folding scales must leave the float block {task.name} unchanged; its output moved by "
            f"{error:.1e}: set strict: false to quantize it without scales"
        )
    for name, parameter in scaled.named_parameters():
        parameter.copy_(originals[name])
    return {}, [f"folds dropped, output moved by {error:.1e}"]


def _take_over(producer: nn.Module, scaled: nn.Module, skip: str) -> None:
    """A norm's weight and bias; of a Linear the bias, for its weight is still to be quantized."""
    for name, parameter in producer.named_parameters(recurse=False):
        if name != skip:
            parameter.copy_(scaled.get_parameter(name))


def _choose(W: Tensor, moment: Tensor, factor: Factor | None, scheme: Scheme, task: BlockTask) -> Choice:
    """Codes of a scaled weight: rounded, or solved for with the Hessian of the scaled inputs."""
    if factor is not None:
        return choose_codes(W, moment, factor, scheme, task)
    if task.config.awq.clip:
        grid = search_clip(W, moment, scheme, scale_dtype=task.scale_dtype)
    else:
        grid = min_max_grid(W, scheme, scale_dtype=task.scale_dtype)
    codes = nearest_codes(W, grid)
    return Choice(codes, grid, quadratic_loss(W - values(codes, grid), moment))


def _awq_linear(
    module: nn.Module, W: Tensor, choice: Choice, moment: Tensor, hessian: Tensor, row: dict[str, object]
) -> ModuleResult:
    """Put the codes of the scaled weight ``W`` into ``module``, which still holds the parent's, to compare with."""
    started = time.perf_counter()
    parent, grid = weight_of(module).float(), choice.grid
    loss = choice.loss / max(quadratic_loss(W, moment), TINY)
    scheme = Scheme(grid.bits, grid.group_size, grid.symmetric)
    plain = min_max_grid(parent, scheme, scale_dtype=module.get_parameter("weight").dtype)
    rounding = rounding_loss(parent, hessian, plain) / max(quadratic_loss(parent, hessian), TINY)
    return finish(module, Solved(choice.codes, grid, loss, rounding), row, started)
