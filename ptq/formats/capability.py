"""Which format can hold what, as data, and the checks made with it before anything is computed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ptq.errors import ConfigError
from ptq.formats.codec import Scheme

# Last name components of output heads: GPTQ and AWQ files leave them in float unless the config has `lm_head: true`.
HEADS = ("lm_head", "embed_out")


class Capability(NamedTuple):
    """What a format can hold when it is written."""

    widths: frozenset[tuple[int, bool]]  # (bits, symmetric)
    rows: int  # out_features must be a multiple of this
    columns: int  # in_features must be a multiple of this
    uniform: bool  # every quantized module shares one scheme


def _widths(symmetric: Iterable[int], asymmetric: Iterable[int]) -> frozenset[tuple[int, bool]]:
    return frozenset([(bits, True) for bits in symmetric] + [(bits, False) for bits in asymmetric])


CAPABILITIES: Mapping[str, Capability] = {
    # v1 stores zero - 1 and so cannot hold a zero point of 0: symmetric only.
    "gptq": Capability(_widths((2, 3, 4, 8), ()), rows=32, columns=32, uniform=False),
    "gptq_v2": Capability(_widths((2, 3, 4, 8), (2, 3, 4, 8)), rows=32, columns=32, uniform=False),
    "awq": Capability(_widths((4,), (4,)), rows=8, columns=1, uniform=True),
    "compressed-tensors": Capability(_widths(range(2, 9), range(2, 9)), rows=1, columns=1, uniform=False),
}


def describe(scheme: Scheme) -> str:
    """Words for messages, for example ``4-bit symmetric, group_size 128``."""
    symmetry = "symmetric" if scheme.symmetric else "asymmetric"
    return f"{scheme.bits}-bit {symmetry}, group_size {scheme.group_size}"


def problem(codec: str, scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why format ``codec`` cannot hold an ``(N, K)`` weight of this scheme, or None."""
    rows, columns = shape
    capability = CAPABILITIES[codec]
    if (scheme.bits, scheme.symmetric) not in capability.widths:
        return f"{codec} cannot hold {describe(scheme)}"
    if rows % capability.rows:
        return f"{codec} needs out_features to be a multiple of {capability.rows}, found {rows}"
    if columns % capability.columns:
        return f"{codec} needs in_features to be a multiple of {capability.columns}, found {columns}"
    return None


def check_schemes(codec: str, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ConfigError for the first module that format ``codec`` cannot hold, naming the formats that can."""
    default = common_scheme(schemes)
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        columns = shapes[name][1]
        if scheme.group_size != -1 and (scheme.group_size < 1 or columns % scheme.group_size):
            raise ConfigError(
                f"{name}: group_size must be -1 or divide in_features {columns}, found {scheme.group_size}; "
                "choose a divisor or -1 (one group a row)"
            )
        reason = problem(codec, scheme, shapes[name])
        if reason is not None:
            able = [other for other in CAPABILITIES if problem(other, scheme, shapes[name]) is None]
            remedy = f"formats that can hold it: {', '.join(able)}" if able else "leave it in float or change its bits"
            raise ConfigError(f"{name} {list(shapes[name])}: {reason}; {remedy}")
        if CAPABILITIES[codec].uniform and scheme != default:
            able = [other for other, capability in CAPABILITIES.items() if not capability.uniform]
            raise ConfigError(
                f"{codec} holds one scheme for all modules; {name} is {describe(scheme)}, the others are "
                f"{describe(default)}. Use one scheme, or a format that can mix: {', '.join(able)}"
            )


def common_scheme(schemes: Mapping[str, Scheme | None]) -> Scheme:
    """The most frequent scheme (the first of equals). Raises ConfigError when every module is float."""
    counts = Counter(scheme for scheme in schemes.values() if scheme is not None)
    if not counts:
        raise ConfigError(
            f"a quantized checkpoint needs at least one quantized Linear, found none among {len(schemes)}; "
            "check the skip patterns and overrides"
        )
    return counts.most_common(1)[0][0]


def widths_of(codec: str) -> set[int]:
    """Widths of a format whatever the symmetry."""
    return {bits for bits, _ in CAPABILITIES[codec].widths}


def is_head(name: str) -> bool:
    """Whether a Linear is an output head by its name."""
    return name.rpartition(".")[2] in HEADS
