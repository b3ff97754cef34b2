"""Conditions under which an evaluation counts as failed: ``ptq eval --fail-if "kl>0.05"``, for people's pipelines."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ptq.errors import ConfigError, GateError
from ptq.schema import suggestion

# Name as it may be typed -> key of an evaluation's row.
METRICS = {"kl": "kl", "perplexity": "perplexity", "top1": "top1", "agreement": "top1"}
NEED_PARENT = ("kl", "top1")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(>=|<=|>|<)\s*(\S+)\s*")


class Condition(NamedTuple):
    """One comparison of a metric with a number."""

    metric: str  # key of an evaluation's row
    sign: str
    limit: float
    text: str  # as it was typed

    def holds(self, value: float) -> bool:
        """Whether a measured value meets the condition, which means failure; NaN, which says nothing, fails too."""
        return math.isnan(value) or _OPERATORS[self.sign](value, self.limit)


def parse_condition(text: str) -> Condition:
    """``"kl>0.05"`` as a `Condition`.

    Metrics: ``kl`` (nats a token), ``perplexity``, ``top1`` or ``agreement`` (a share between 0 and 1); operators
    ``>``, ``>=``, ``<``, ``<=``.

    Raises:
        ConfigError: an unknown metric, another form, a limit that is not a number, a share above 1.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--fail-if must read METRIC OPERATOR NUMBER with >, >=, < or <=, as in 'kl>0.05'; found {text!r}"
        )
    name, sign, written = match.groups()
    if name not in METRICS:
        raise ConfigError(
            f"--fail-if must name one of {', '.join(METRICS)}; found {name!r} in {text!r}{suggestion(name, METRICS)}"
        )
    try:
        limit = float(written)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ConfigError(f"--fail-if must compare with a finite number; found {written!r} in {text!r}")
    if METRICS[name] == "top1" and not 0 <= limit <= 1:
        raise ConfigError(f"--fail-if compares {name} with a share between 0 and 1; found {written} in {text!r}")
    return Condition(METRICS[name], sign, limit, text.strip())


def require_parent(conditions: Iterable[Condition], parent: str | None) -> None:
    """Refuse a condition on a distance to a parent that nobody named.

    Raises:
        ConfigError: KL or agreement is asked for without a parent.
    """
    for condition in conditions:
        if parent is None and condition.metric in NEED_PARENT:
            raise ConfigError(f"--fail-if {condition.text!r} compares with the parent; found none: add --parent MODEL")


def require_passed(conditions: Iterable[Condition], row: Mapping[str, Any]) -> None:
    """Compare an evaluation's row, ``{"perplexity": ..., "kl": ..., "top1": ...}``, with every condition.

    Raises:
        GateError: at least one condition holds; all that do are named.
    """
    met = [f"{c.text!r} holds: {c.metric} is {row[c.metric]:.6g}" for c in conditions if c.holds(row[c.metric])]
    if met:
        raise GateError(f"the checkpoint fails its gate: {'; '.join(met)}")
