"""AWQ on one block: one pass of statistics, scales folded group by group in execution order, clip, round."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq.awq.fold import UNCHANGED, Fold, apply_fold, difference, find_folds, with_all_experts
from ptq.awq.solver import rescale, search_clip, search_scales
from ptq.calibration.capture import InputGroup, InputStats, collect
from ptq.calibration.held import Run, let_go
from ptq.distributed import Ranks
from ptq.errors import NumericsError
from ptq.formats.codec import Scheme
from ptq.gptq.block import Choice, choose_codes, factor_of, gptq_block, whole
from ptq.grid import min_max_grid, nearest_codes, values
from ptq.half_products import plain_products
from ptq.loss import quadratic_loss, rounding_loss
from ptq.models.structure import weight_of
from ptq.task import BlockTask, ModuleResult, Solved, counted, faint, finish, share

# GPTQ keeps scales only if they bring its loss below this share: less is within what another calibration text changes.
WORTHWHILE = 0.9


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
    stats = collect(modules, groups, runs, task.full(""), task.ranks)
    scaled = copy.deepcopy(block).float()
    found = _fold_all(scaled, groups, stats, task) if task.ranks.first else ({}, [])
    folded, rescues = _agreed(scaled, found, task.ranks)
    if task.config.awq.codes == "gptq":
        results = _solve_folded(block, scaled, modules, groups, runs, task)
    else:
        for path in {path for fold, _ in folded.values() for path in (fold.producer, *fold.floats)}:
            _take_over(block.get_submodule(path), scaled.get_submodule(path), skip="weight" if path in modules else "")
        results = _round_scaled(scaled, modules, groups, stats, folded, task)
    for name, result in results.items():
        fold = folded[name][0] if name in folded else None
        result.row.update(fold=fold.producer if fold else None, rescues=[*rescues, *result.row["rescues"]])
    return results


def _agreed(
    scaled: nn.Module, found: tuple[dict[str, tuple[Fold, Tensor]], list[str]], ranks: Ranks
) -> tuple[dict[str, tuple[Fold, Tensor]], list[str]]:
    """What the first of several processes has folded: proofs on other tokens might come out otherwise."""
    if ranks.size == 1:
        return found
    folded, rescues = found
    on_cpu = {name: (fold._replace(rows=fold.rows.cpu()), scales.cpu()) for name, (fold, scales) in folded.items()}
    on_cpu, rescues = ranks.told((on_cpu, rescues))
    for parameter in scaled.parameters():
        ranks.take_over(parameter.data)
    device = next(scaled.parameters()).device
    return {name: (fold, scales.to(device)) for name, (fold, scales) in on_cpu.items()}, rescues


@plain_products()
def _round_scaled(
    scaled: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    stats: Sequence[InputStats],
    folded: Mapping[str, tuple[Fold, Tensor]],
    task: BlockTask,
) -> dict[str, ModuleResult]:
    """Clip and round the scaled weights."""
    results = {}
    for group, input_stats in zip(groups, stats, strict=True):
        _, scales = folded.get(group.members[0], (None, None))
        moment = input_stats.hessian if scales is None else rescale(input_stats.hessian, scales)
        for name in group.members:
            weight = weight_of(scaled.get_submodule(name))
            part = _clip_and_round(weight[task.ranks.rows(len(weight))], moment, task.schemes[name], task)
            choice = whole(part, len(weight), task.ranks)
            row: dict[str, Any] = {"solver": "awq", "fold": None, **counted(input_stats)}
            row["rescues"] = faint(input_stats, task.full(name), task.config.strict)
            results[name] = _awq_linear(modules[name], weight, choice, moment, input_stats.hessian, row)
    return results


def _solve_folded(
    block: nn.Module,
    scaled: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    runs: Sequence[Run],
    task: BlockTask,
) -> dict[str, ModuleResult]:
    """GPTQ on the scaled block, input group after input group.

    The float twin is scaled alike while that lasts, so that both read inputs of the same scale; it gets its own weights
    back for whatever follows the float model.
    """
    twins = [] if task.twin is None else [task.twin.block]
    before = {name: p.detach().clone() for twin in twins for name, p in twin.named_parameters()}
    for each in (block, *twins):
        _copy_parameters(each, dict(scaled.named_parameters()))
    weights = {name: weight_of(scaled.get_submodule(name)) for name in modules}
    try:
        results = gptq_block(modules, groups, runs, task, weights)
    finally:
        if task.twin is not None:
            let_go(task.twin.runs)
            _copy_parameters(task.twin.block, before)
    for result in results.values():
        if result.row["solver"] == "gptq":
            result.row["solver"] = "awq+gptq"
    return results


def _copy_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


@plain_products()
def _fold_all(
    scaled: nn.Module, groups: Sequence[InputGroup], stats: Sequence[InputStats], task: BlockTask
) -> tuple[dict[str, tuple[Fold, Tensor]], list[str]]:
    """Search and apply scales on the float32 block: for each Linear that got them, its fold and the scales."""
    if task.probe is None:
        return {}, []
    probe = with_all_experts(task.probe)
    before = probe(scaled)
    originals = {name: p.detach().clone() for name, p in scaled.named_parameters()}
    applied: dict[str, tuple[Fold, Tensor]] = {}
    for fold in find_folds(scaled, groups, task.probe):
        moments = _together(
            [each for group, each in zip(groups, stats, strict=True) if group.members[0] in fold.consumers]
        )
        found = search_scales(
            [weight_of(scaled.get_submodule(name)) for name in fold.consumers],
            moments.hessian,
            moments.magnitude,
            [task.schemes[name] for name in fold.consumers],
            grid=task.config.awq.grid,
            clip=task.config.awq.clip,
            scale_dtype=task.scale_dtype,
            tied=fold.rows - fold.rows.min(),
        )
        if task.config.awq.codes == "gptq" and not _pays(scaled, fold, moments.hessian, found.scales, task):
            continue
        used = apply_fold(scaled, fold, found.scales, task.scale_dtype)
        applied |= dict.fromkeys(fold.consumers, (fold, used))
    error = difference(probe(scaled), before)
    if error < UNCHANGED:
        return applied, []
    if task.config.strict:
        raise NumericsError(
            f"strict: folding scales must leave the float block {task.name} unchanged; its output moved by "
            f"{error:.1e}: set strict: false to quantize it without scales"
        )
    _copy_parameters(scaled, originals)
    return {}, [f"folds dropped, output moved by {error:.1e}"]


def _together(stats: Sequence[InputStats]) -> InputStats:
    """Statistics of several experts' inputs as those of one, each counting by its tokens."""
    tokens = [each.tokens if each.routed is None else max(each.routed, 1) for each in stats]
    total = sum(tokens)
    hessian, magnitude = torch.zeros_like(stats[0].hessian), torch.zeros_like(stats[0].magnitude)
    for each, n in zip(stats, tokens, strict=True):
        hessian.add_(each.hessian, alpha=n / total)
        magnitude.add_(each.magnitude, alpha=n / total)
    return InputStats(hessian, magnitude, total)


def _take_over(producer: nn.Module, scaled: nn.Module, skip: str) -> None:
    """A norm's weight and bias; of a Linear the bias alone, as its weight is still to be quantized."""
    for name, parameter in producer.named_parameters(recurse=False):
        if name != skip:
            parameter.copy_(scaled.get_parameter(name))


def _pays(scaled: nn.Module, fold: Fold, moment: Tensor, scales: Tensor, task: BlockTask) -> bool:
    """Whether GPTQ loses clearly less with the scales than without; they were chosen by what rounding loses."""
    losses = []
    for s in (torch.ones_like(scales), scales):
        H = rescale(moment, s)
        factor = factor_of(H, fold.consumers[0], task)
        weights = {name: weight_of(scaled.get_submodule(name)) * s for name in fold.consumers}
        losses.append(sum(choose_codes(W, H, factor, task.schemes[name], task).loss for name, W in weights.items()))
    return losses[1] < WORTHWHILE * losses[0]


def _clip_and_round(W: Tensor, moment: Tensor, scheme: Scheme, task: BlockTask) -> Choice:
    """Codes of a scaled weight, each rounded by itself."""
    if task.config.awq.clip and len(W):
        grid = search_clip(W, moment, scheme, scale_dtype=task.scale_dtype)
    else:
        grid = min_max_grid(W, scheme, scale_dtype=task.scale_dtype)
    codes = nearest_codes(W, grid)
    return Choice(codes, grid, quadratic_loss(W - values(codes, grid), moment))


def _awq_linear(
    module: nn.Module, W: Tensor, choice: Choice, moment: Tensor, hessian: Tensor, row: dict[str, Any]
) -> ModuleResult:
    """Put the codes of the scaled weight ``W`` into ``module``, which still holds the parent's, to compare with."""
    started = time.perf_counter()
    parent, grid = weight_of(module).float(), choice.grid
    loss = share(choice.loss, quadratic_loss(W, moment))
    scheme = Scheme(grid.bits, grid.group_size, grid.symmetric)
    plain = min_max_grid(parent, scheme, scale_dtype=module.get_parameter("weight").dtype)
    rounding = share(rounding_loss(parent, hessian, plain), quadratic_loss(parent, hessian))
    return finish(module, Solved(choice.codes, grid, loss, rounding), row, started)
