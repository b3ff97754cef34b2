"""What every group of Linears would lose at every width, from one pass of the float model; and the budget spent on it.

For each group of Linears that share an input (seen, not named: `trace_groups`) the pass collects the Hessian of that
input and predicts each Linear's relative output error at each width. Whether an error there matters is measured: the
group is rounded to a few bits alone, a few hundred tokens are carried through the rest of the model beside the float
ones, and the KL divergence at the end, divided by the error, is the group's sensitivity. Sensitivity times error is a
predicted KL divergence in nats a token, which adds up over groups. The pass runs in float32: half precision would drown
the effect of one group.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.budget import Item, allocate, widths_for
from ptq.calibration.capture import InputGroup, InputStats, collect, trace_groups
from ptq.calibration.held import Run
from ptq.config import BitBudget, RunConfig
from ptq.float_stream import float_stream
from ptq.formats.codec import Scheme
from ptq.gptq.solver import Factor, factorize
from ptq.grid import nearest_codes, values
from ptq.grid_search import COARSE, search_grid
from ptq.half_products import plain_products
from ptq.loss import quadratic_loss
from ptq.models.streamed import StreamedModel
from ptq.models.structure import linears, set_weight, weight_of
from ptq.plan import Plan
from ptq.progress import Progress
from ptq.task import TINY, share

# Tokens carried through the rest of the model once for each group.
PROBE_TOKENS = 512
# The rounding whose effect is measured: well above what float32 loses, and among the widths that budgets choose.
PROBE_BITS = 3


class Measured(NamedTuple):
    """One group of Linears that get one width together."""

    members: tuple[str, ...]  # paths in the model
    weights: int
    losses: dict[str, dict[int, float]]  # Linear -> bits -> predicted relative output error
    sensitivity: float  # KL divergence in nats a token for a summed relative output error of 1

    def predicted(self, bits: int) -> float:
        """KL divergence, in nats a token, that this group alone is predicted to cost."""
        return self.sensitivity * sum(losses[bits] for losses in self.losses.values())

    @property
    def widths(self) -> tuple[int, ...]:
        """What it may get."""
        return tuple(next(iter(self.losses.values())))


class _Rounded(NamedTuple):
    """Predicted losses of some Linears, and their weights rounded for the probe."""

    losses: dict[str, dict[int, float]]
    weights: dict[str, Tensor]
    probe_loss: float  # summed relative output error of ``weights``


class _Carried(NamedTuple):
    """A probe on its way through the model, with one group rounded."""

    members: tuple[str, ...]
    rounded: _Rounded
    size: int
    hidden: Tensor


def measure(plan: Plan, batches: Sequence[Tensor], progress: Progress) -> list[Measured]:
    """Losses and sensitivities of every group of Linears to be quantized, in execution order.

    Args:
        plan: with every Linear's scheme; the widths they name are not used.
        batches: calibration tokens ``int64 [B, T]``.
        progress: is told of every finished block.

    Raises:
        NumericsError: NaN or infinity in weights or activations.
        UnsupportedModelError: a Linear that the text does not reach.
    """
    stream = float_stream(plan)
    batches = _with_probe(batches)
    hidden = stream.enter(batches)
    carried: list[_Carried] = []
    total = len(stream.blocks)
    for index in range(total):
        path = stream.block_path(index)
        progress.module(path)
        with stream.block(index) as block:
            runs: list[Run] = [partial(stream.run_block, index, i, h) for i, h in enumerate(hidden)]
            carried = [c._replace(hidden=stream.run_block(index, 0, c.hidden).cpu()) for c in carried]
            names = {name: module for name, module in linears(block) if f"{path}.{name}" in plan.targets}
            carried += [c._replace(hidden=c.hidden.cpu()) for c in _probes(names, f"{path}.", runs, plan)]
            hidden = [run().cpu() for run in runs]
        progress.step(index, total)
    return _finish(plan, stream, batches, hidden, carried)


def _with_probe(batches: Sequence[Tensor]) -> list[Tensor]:
    """The same sequences, the first of them, about `PROBE_TOKENS` tokens, as a batch of their own."""
    first, *rest = batches
    rows = max(1, PROBE_TOKENS // first.shape[1])
    parts = [first[:rows], first[rows:]]
    return [part for part in [*parts, *rest] if len(part)]


def _probes(modules: Mapping[str, nn.Module], where: str, runs: Sequence[Run], plan: Plan) -> Iterator[_Carried]:
    """For each group: its losses, and what the probe is like after a block with this group rounded."""
    if not modules:
        return
    groups = trace_groups(modules, runs[:1])
    for bundle in _bundles(groups, collect(modules, groups, runs, where)):
        parts: dict[tuple[int, ...], list[_Rounded]] = {}
        for group, stats in bundle:
            factor = _factor(stats, plan.config)
            for widths, members in _by_width(group, where, plan).items():
                chosen = {f"{where}{name}": modules[name] for name in members}
                parts.setdefault(widths, []).append(_round(chosen, stats.hessian, factor, plan))
        for rounded in map(_merged, parts.values()):
            chosen = {name: modules[name.removeprefix(where)] for name in rounded.weights}
            with _replaced(chosen, rounded.weights):
                hidden = runs[0]()
            size = sum(weight_of(module).numel() for module in chosen.values())
            yield _Carried(tuple(chosen), rounded._replace(weights={}), size, hidden)


def _bundles(groups: Sequence[InputGroup], stats: Sequence[InputStats]) -> list[list[tuple[InputGroup, InputStats]]]:
    """What gets one width: an input group, and all experts of a layer, which engines run as one."""
    found: dict[tuple[bool, int], list[tuple[InputGroup, InputStats]]] = {}
    for index, pair in enumerate(zip(groups, stats, strict=True)):
        pool = pair[0].pool
        found.setdefault((pool is None, index if pool is None else pool), []).append(pair)
    return list(found.values())


def _merged(parts: Sequence[_Rounded]) -> _Rounded:
    losses = {name: found for part in parts for name, found in part.losses.items()}
    weights = {name: weight for part in parts for name, weight in part.weights.items()}
    return _Rounded(losses, weights, sum(part.probe_loss for part in parts))


@plain_products()
def _factor(stats: InputStats, config: RunConfig) -> Factor | None:
    """What GPTQ's losses are predicted with; rounding needs none."""
    if not config.solves_for_codes:
        return None
    return factorize(stats.hessian, damping=config.gptq.damping, activation_order=config.gptq.activation_order)


def _by_width(group: InputGroup, where: str, plan: Plan) -> dict[tuple[int, ...], list[str]]:
    """The members by the widths they may get: those that ``overrides`` fix stand apart from the others."""
    split: dict[tuple[int, ...], list[str]] = {}
    for name in group.members:
        full = f"{where}{name}"
        split.setdefault(widths_for(plan.config, full, plan.targets[full]), []).append(name)
    return split


@torch.no_grad()
@plain_products()
def _round(modules: Mapping[str, nn.Module], hessian: Tensor, factor: Factor | None, plan: Plan) -> _Rounded:
    losses: dict[str, dict[int, float]] = {}
    weights: dict[str, Tensor] = {}
    probe_loss = 0.0
    for name, module in modules.items():
        W = weight_of(module).float()
        scheme = plan.targets[name]
        widths = widths_for(plan.config, name, scheme)
        energy = quadratic_loss(W, hessian)
        probe = min(widths, key=lambda bits: (abs(bits - PROBE_BITS), bits))
        losses[name] = {}
        for bits in widths:
            D = W - _nearest(W, hessian, scheme._replace(bits=bits), plan.dtype)
            rounding = share(quadratic_loss(D, hessian), energy)
            losses[name][bits] = rounding if factor is None else share(_gptq_loss(D, factor), energy)
            if bits == probe:
                weights[name] = W - D
                probe_loss += rounding
    return _Rounded(losses, weights, probe_loss)


def _nearest(W: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """W rounded on the grid that loses least under the Hessian's diagonal."""
    importance = hessian.diagonal() + 0.01 * hessian.diagonal().mean() + TINY
    grid = search_grid(W, importance, scheme, scale_dtype=scale_dtype, shrinks=COARSE)
    return values(nearest_codes(W, grid), grid)


def _gptq_loss(D: Tensor, factor: Factor) -> float:
    """GPTQ's loss without running it: ``sum_k |d_k|^2 / U_kk^2``, with the rounding errors of the weight as it is.

    GPTQ rounds weights it has moved; their rounding errors are as large on average.
    """
    squares = D.square().sum(0)[factor.order_K]
    return float((squares / factor.U_KK.diagonal().square()).sum(dtype=torch.float64))


@contextmanager
def _replaced(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in some Linears for a while."""
    kept = {name: weight_of(module).clone() for name, module in modules.items()}
    try:
        for name, module in modules.items():
            set_weight(module, weights[name])
        yield
    finally:
        for name, module in modules.items():
            set_weight(module, kept[name])


@torch.no_grad()
def _finish(
    plan: Plan, stream: StreamedModel, batches: Sequence[Tensor], hidden: Sequence[Tensor], carried: Sequence[_Carried]
) -> list[Measured]:
    """Sensitivities from what reached the end, and the head's own where it is to be quantized."""
    with stream.outer():
        reference = stream.logits(batches[0], hidden[0]).log_softmax(-1)
        measured = [_measured(c, reference, stream.logits(batches[0], c.hidden)) for c in carried]
        outside = [name for name in plan.targets if not name.startswith(f"{plan.blocks}.")]
        heads = {name: stream.model.get_submodule(name) for name in outside}
        runs: list[Run] = [partial(stream.logits, batch, h) for batch, h in zip(batches, hidden, strict=True)]
        measured += [_measured(c, reference, c.hidden) for c in _probes(heads, "", runs, plan)]
    return measured


def _measured(carried: _Carried, reference: Tensor, logits: Tensor) -> Measured:
    log_q = logits.log_softmax(-1)
    kl = float((reference.exp() * (reference - log_q)).sum(-1).mean(dtype=torch.float64))
    # Rounding that changed nothing (an all-zero weight) says nothing of the group; TINY keeps it the cheapest to round.
    sensitivity = max(kl, TINY) / max(carried.rounded.probe_loss, TINY)
    return Measured(carried.members, carried.size, carried.rounded.losses, sensitivity)


def spend(plan: Plan, measured: Sequence[Measured]) -> tuple[Plan, dict[str, Any]]:
    """The plan with every Linear's width chosen, and what the report says about the choice."""
    assert isinstance(plan.config.bits, BitBudget)
    items = [Item(group.weights, {bits: group.predicted(bits) for bits in group.widths}) for group in measured]
    widths = allocate(items, plan.config.bits.budget)
    schemes = dict(plan.schemes)
    groups = []
    for group, bits in zip(measured, widths, strict=True):
        for name in group.members:
            schemes[name] = plan.targets[name]._replace(bits=bits)
        groups.append({
            "modules": list(group.members),
            "weights": group.weights,
            "bits": bits,
            "sensitivity": group.sensitivity,
            "predicted_kl": {str(width): group.predicted(width) for width in group.widths},
            "predicted_relative_loss": {name: losses[bits] for name, losses in group.losses.items()},
        })  # fmt: skip
    plan.codec.check(schemes, plan.shapes)
    weights = sum(group.weights for group in measured)
    document = {
        "budget": plan.config.bits.budget,
        "average_bits": sum(g.weights * bits for g, bits in zip(measured, widths, strict=True)) / weights,
        "widths": sorted({bits for group in measured for bits in group.widths}),
        "widths_not_offered": "6 (no kernel runs it)",
        "predicted_kl": sum(item.losses[bits] for item, bits in zip(items, widths, strict=True)),
        "groups": groups,
    }
    return plan._replace(schemes=schemes), document


def as_chosen(plan: Plan, document: Mapping[str, Any]) -> Plan:
    """The plan with the widths that the report of an earlier run names; the same plan where there was no budget."""
    schemes = dict(plan.schemes)
    for group in document.get("budget", {}).get("groups", ()):
        schemes.update({name: plan.targets[name]._replace(bits=group["bits"]) for name in group["modules"]})
    return plan._replace(schemes=schemes)
