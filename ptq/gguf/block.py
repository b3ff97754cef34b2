"""The Linears of one block solved on the grids of their block formats, in execution order."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import InputGroup, InputStats, collect, collect_drift, trace_groups
from ptq.calibration.held import Run
from ptq.config import GPTQConfig
from ptq.gguf.blocks import values
from ptq.gguf.rounding import raised_groups
from ptq.gguf.solver import SolvedBlocks, solve_blocks
from ptq.gptq.solver import correction, factorize, require_no_rescue
from ptq.grid import check_finite
from ptq.half_products import plain_products
from ptq.loss import quadratic_loss
from ptq.models.structure import linears, set_weight, weight_of
from ptq.task import FloatTwin, faint, share


class SolvedLinear(NamedTuple):
    """Blocks of a Linear and their loss; losses as shares of the energy of its output."""

    solved: SolvedBlocks
    rescues: tuple[str, ...]
    raised: int  # groups too small for a scale of their own (see `raised_groups`)


class BlockFormats(NamedTuple):
    """What to do to one block."""

    name: str  # dotted path, "" for a whole model
    kinds: Mapping[str, str]  # Linear's path below the block -> block format
    settings: GPTQConfig
    strict: bool
    twin: FloatTwin | None = None


@torch.no_grad()
def solve_linears(block: nn.Module, runs: Sequence[Run], task: BlockFormats) -> dict[str, SolvedLinear]:
    """Solve the Linears of ``task.kinds`` and leave the values of their codes in the block.

    Each group of Linears is calibrated on what the solved ones before it put out.

    Raises:
        FormatError: blocks do not fill a row.
        NumericsError: an activation or weight is not finite, a weight is larger than the scales of its kind reach, or
            under ``strict`` a Hessian needed a rescue.
        UnsupportedModelError: a Linear was never reached.
    """
    modules = {path: module for path, module in linears(block) if path in task.kinds}
    for path, module in modules.items():  # before activations or corrections carry a NaN elsewhere
        check_finite(weight_of(module), f"{_full(task, path)}.weight")
    results: dict[str, SolvedLinear] = {}
    for group in trace_groups(modules, runs[:1]) if modules else ():
        stats, drift = _statistics(modules, group, runs, task)
        results |= _solve_group({name: modules[name] for name in group.members}, stats, drift, task)
    return results


@plain_products()
def _solve_group(
    modules: Mapping[str, nn.Module], stats: InputStats, drift: Tensor | None, task: BlockFormats
) -> dict[str, SolvedLinear]:
    """The Linears that read one input."""
    results: dict[str, SolvedLinear] = {}
    settings = task.settings
    factor = factorize(stats.hessian, damping=settings.damping, activation_order=settings.activation_order)
    first = _full(task, next(iter(modules)))
    too_small = faint(stats, first, task.strict)
    if task.strict:
        require_no_rescue(factor, first)
    shift = None if drift is None else correction(drift, factor, settings.correct_inputs)
    for name, module in modules.items():
        W = weight_of(module).float()
        target = W if shift is None else W.addmm(W, shift)
        kind = task.kinds[name]
        solved = solve_blocks(
            kind, target, stats.hessian, factor, sweeps=settings.sweeps, block_size=settings.block_size,
            name=f"{_full(task, name)}.weight",
        )  # fmt: skip
        raised = raised_groups(kind, W)
        set_weight(module, values(solved.blocks))
        energy = quadratic_loss(target, stats.hessian)
        relative = solved._replace(loss=share(solved.loss, energy), rounding=share(solved.rounding, energy))
        results[name] = SolvedLinear(relative, (*too_small, *factor.rescues), raised)
    return results


def _full(task: BlockFormats, member: str) -> str:
    return f"{task.name}.{member}" if task.name else member


def _statistics(
    modules: Mapping[str, nn.Module], group: InputGroup, runs: Sequence[Run], task: BlockFormats
) -> tuple[InputStats, Tensor | None]:
    head = group.members[0]
    if task.twin is None or group.pool is not None:
        return collect(modules, [group], runs, _full(task, ""))[0], None
    float_module, pairs = task.twin.block.get_submodule(head), zip(runs, task.twin.runs, strict=True)
    return collect_drift(modules[head], float_module, group.calls, pairs, _full(task, head))
