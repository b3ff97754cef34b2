"""A bit budget: which width each group of Linears gets, so that the average holds and the predicted loss is least.

One of several widths for each item, the sum of ``bits * weights`` bounded: a multiple-choice knapsack. It is solved
exactly. A Lagrange multiplier prices a bit; a greedy fill at that price is a first answer; a dynamic programme over the
partial sums then keeps only what the priced rest could still make better than that answer.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from ptq.config import BitBudget, RunConfig, fixed_bits
from ptq.errors import ConfigError
from ptq.formats.capability import CAPABILITIES
from ptq.formats.codec import WIDTHS, Scheme

# Room for the rounding of sums of losses, so that no optimum is cut off.
SLACK = 1e-9


class Item(NamedTuple):
    """Weights that get one width together, and what each width is predicted to lose."""

    weights: int
    losses: Mapping[int, float]  # bits -> loss, in units that add up over items


class _Partial(NamedTuple):
    """A choice for the first items: bits spent, loss, and how it came about."""

    cost: int
    loss: float
    before: int  # index among the partial choices one item earlier
    bits: int


def capacity(budget: float, weights: int) -> int:
    """Bits there are to spend; exact for the decimal number that was written."""
    return int(Fraction(str(budget)) * weights)


def allocate(items: Sequence[Item], budget: float) -> list[int]:
    """The width of each item: least summed loss with ``sum(bits * weights) <= budget * sum(weights)``.

    Of several such choices the one that spends most. A width that costs more and loses no less is never chosen.

    Raises:
        ConfigError: the narrowest widths already exceed the budget.
    """
    room = capacity(budget, sum(item.weights for item in items))
    order = sorted(range(len(items)), key=lambda i: -items[i].weights)
    options = [_useful(items[i]) for i in order]
    least = sum(choice[0][1] for choice in options)
    if least > room:
        total = sum(item.weights for item in items)
        raise ConfigError(
            f"bits.budget must be at least {least / total:.4g}, which is what the narrowest widths and the fixed "
            f"modules take; found {budget}: raise it, or fix fewer modules in overrides"
        )
    price, bound = _greedy(options, room)
    chosen = _exact(options, room, price, bound + SLACK * abs(bound))
    widths = [0] * len(items)
    for place, bits in zip(order, chosen, strict=True):
        widths[place] = bits
    return widths


# Widths of one item worth considering, as (bits, cost, loss): cost rises, loss falls.
_Options = list[tuple[int, int, float]]


def _useful(item: Item) -> _Options:
    kept: _Options = []
    for bits in sorted(item.losses):
        if not kept or item.losses[bits] < kept[-1][2]:
            kept.append((bits, bits * item.weights, item.losses[bits]))
    return kept


def _greedy(options: Sequence[_Options], room: int) -> tuple[float, float]:
    """The price of a bit, and the loss of buying the best steps of each item's convex hull while they fit."""
    steps = []
    for index, choices in enumerate(options):
        at = 0
        while at + 1 < len(choices):
            _, cost, loss = choices[at]
            gains = [((loss - choices[j][2]) / (choices[j][1] - cost), j) for j in range(at + 1, len(choices))]
            gain, to = max(gains)
            steps.append((gain, index, at, to))
            at = to
    left = room - sum(choices[0][1] for choices in options)
    place = [0] * len(options)
    price = 0.0
    for gain, index, at, to in sorted(steps, key=lambda step: -step[0]):
        cost = options[index][to][1] - options[index][at][1]
        if place[index] == at and cost <= left:
            place[index], left = to, left - cost
        else:
            price = max(price, gain)
    return price, sum(choices[at][2] for choices, at in zip(options, place, strict=True))


def _exact(options: Sequence[_Options], room: int, price: float, bound: float) -> list[int]:
    """Widths of least loss; every partial choice whose priced rest cannot stay within ``bound`` is dropped."""
    cheapest = _suffix([choices[0][1] for choices in options])
    priced = _suffix([min(loss + price * cost for _, cost, loss in choices) for choices in options])
    stages = [[_Partial(0, 0.0, -1, 0)]]
    for index, choices in enumerate(options):
        reached = sorted(
            _Partial(partial.cost + cost, partial.loss + loss, before, bits)
            for before, partial in enumerate(stages[-1])
            for bits, cost, loss in choices
            if partial.cost + cost + cheapest[index + 1] <= room
            and partial.loss + loss + priced[index + 1] - price * (room - partial.cost - cost) <= bound
        )
        kept: list[_Partial] = []
        for partial in reached:
            if not kept or partial.loss < kept[-1].loss:
                kept.append(partial)
        stages.append(kept)
    best = min(range(len(stages[-1])), key=lambda i: (stages[-1][i].loss, -stages[-1][i].cost))
    chosen = []
    for stage in reversed(stages[1:]):
        chosen.append(stage[best].bits)
        best = stage[best].before
    return chosen[::-1]


def _suffix(numbers: Sequence[float]) -> list[float]:
    """Sum of all numbers from each place on; one more entry than numbers."""
    return [*accumulate(reversed(numbers), initial=0)][::-1]


def widths_for(config: RunConfig, name: str, scheme: Scheme) -> tuple[int, ...]:
    """The widths a Linear may get: its own where ``overrides`` fix it, else those its format can store."""
    fixed = fixed_bits(config, name)
    if fixed is not None:
        return (fixed,)
    held = CAPABILITIES[config.format].widths
    return tuple(bits for bits in WIDTHS if (bits, scheme.symmetric) in held)


def check_budget(
    config: RunConfig, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse a budget that the format cannot mix widths for or that cannot be met, before a weight is read.

    Raises:
        ConfigError: the format holds one width only; the modules' narrowest widths exceed the budget.
    """
    if not isinstance(config.bits, BitBudget):
        return
    if CAPABILITIES[config.format].uniform:
        able = [name for name, capability in CAPABILITIES.items() if not capability.uniform]
        raise ConfigError(
            f"bits.budget needs a format that holds several widths; {config.format} holds one: use {', '.join(able)}"
        )
    targets = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    widths = {name: widths_for(config, name, scheme) for name, scheme in targets.items()}
    unheld = next((name for name, held in widths.items() if not held), None)
    if unheld is not None:
        raise ConfigError(f"{config.format} holds no asymmetric widths, which {unheld} asks for: use gptq_v2")
    items = [Item(shapes[name][0] * shapes[name][1], {min(widths[name]): 0.0}) for name in targets]
    allocate(items, config.bits.budget)
