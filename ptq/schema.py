"""Plain YAML values to a tree of frozen dataclasses; every mistake is named by its full key.

The dataclass is the schema: annotations give the types (``bool``, ``int``, ``float``, ``str``, ``Literal[...]`` of
strings, ``X | None``, ``X | Dataclass`` where a mapping is the dataclass, ``tuple[str, ...]``,
``Mapping[str, Dataclass]``, another dataclass), metadata gives a field its :class:`Rule`.
"""

import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from ptq.errors import ConfigError

T = TypeVar("T")


class Rule(NamedTuple):
    """What a value of the right type must satisfy besides."""

    accepts: Callable[[Any], bool]
    required: str  # completes "<key> must be ..."


def checked(accepts: Callable[[Any], bool], required: str) -> dict[str, Rule]:
    """Field metadata: values for which ``accepts`` holds; ``required`` completes "<key> must be ..."."""
    return {"rule": Rule(accepts, required)}


def at_least(minimum: int) -> dict[str, Rule]:
    """Field metadata: a number no smaller than ``minimum``."""
    return checked(lambda value: value >= minimum, f"{minimum} or more")


def suggestion(found: str, candidates: Iterable[str]) -> str:
    """``"; did you mean ...?"`` for the candidate most like ``found``, or nothing when none is near."""
    near = get_close_matches(found, list(candidates), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build(cls: type[T], value: object) -> T:
    """The dataclass ``cls`` from a mapping of plain values. Raises ConfigError at the first mistake."""
    return _dataclass(cls, value, "", known_keys(cls))


def check_rules(config: Any, prefix: str, named: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for the first field of the dataclass ``config`` that breaks its rule or 64 bits.

    ``prefix``: what stands before the field's name, as in ``calibration.`` or ``--``; ``named``: other names of fields.
    """
    for item in fields(config):
        rule, value = item.metadata.get("rule"), getattr(config, item.name)
        name = (named or {}).get(item.name, item.name)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{prefix}{name} must be a number of 64 bits, found {value!r}")
        if rule is not None and value is not None and not rule.accepts(value):
            raise ConfigError(f"{prefix}{name} must be {rule.required}, found {value!r}")


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """Full dotted paths of every key of ``cls`` and of the dataclasses below it."""
    keys = []
    for name, hint in _hints(cls).items():
        keys.append(prefix + name)
        inner = _without_none(hint)
        if isinstance(inner, type) and is_dataclass(inner):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def _without_none(hint: Any) -> Any:
    """``X`` for ``X | None``, anything else as it is."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _dataclass(cls: type[T], value: object, path: str, known: Sequence[str]) -> T:
    if not isinstance(value, Mapping):
        where = path or "the configuration"
        raise ConfigError(f"{where} must be a mapping of keys to values, found {value!r}; write 'key: value' lines")
    prefix = f"{path}." if path else ""
    hints = _hints(cls)
    for key in value:
        if key not in hints:
            raise ConfigError(_unknown(str(key), prefix, list(hints), known))
    values: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]  # T is a dataclass, which typing cannot say of a TypeVar
        full = prefix + item.name
        if item.name not in value:
            if item.default is MISSING and item.default_factory is MISSING:
                raise ConfigError(f"the key {full} is required and was not found; add '{item.name}: ...'")
            continue
        values[item.name] = _value(hints[item.name], value[item.name], full, known)
    built = cls(**values)
    check_rules(built, prefix)
    return built


def _unknown(key: str, prefix: str, siblings: list[str], known: Sequence[str]) -> str:
    """Looks among the keys of the same mapping first, then for a key of that name elsewhere in the tree."""
    hint = suggestion(prefix + key, [prefix + sibling for sibling in siblings])
    elsewhere = {path.rpartition(".")[2]: path for path in known}
    if not hint:
        near = get_close_matches(key, elsewhere, n=1)
        hint = f"; did you mean {elsewhere[near[0]]}?" if near else f"; the keys here are {', '.join(siblings)}"
    return f"unknown key {prefix}{key}{hint}"


def _value(hint: Any, value: object, path: str, known: Sequence[str]) -> object:
    """``value`` converted to the annotated type ``hint``."""
    inner = _without_none(hint)
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    if isinstance(value, Mapping) and isinstance(hint, types.UnionType):
        inner = next((part for part in typing.get_args(hint) if is_dataclass(part)), inner)
    if isinstance(inner, type) and is_dataclass(inner):
        return _dataclass(inner, value, path, known)
    origin = typing.get_origin(inner)
    if origin is tuple:
        return _texts(value, path)
    if origin is Mapping:
        return _mapping(typing.get_args(inner)[1], value, path, known)
    if origin is typing.Literal:
        return _choice(typing.get_args(inner), value, path)
    return _scalar(inner, value, path)


def _scalar(kind: type, value: object, path: str) -> object:
    if kind is float and type(value) is int:
        return float(value)
    # type() rather than isinstance(): YAML's true is a bool, and in Python a bool is an int.
    if type(value) is kind and value != "":
        return value
    required = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text that is not empty (quote what YAML would read as something else)",
    }[kind]
    raise ConfigError(f"{path} must be {required}, found {value!r}")


def _choice(choices: Sequence[str], value: object, path: str) -> object:
    if value in choices:
        return value
    required = f"{', '.join(choices[:-1])} or {choices[-1]}"
    raise ConfigError(f"{path} must be {required}, found {value!r}{suggestion(str(value), choices)}")


def _texts(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{path} must be a list, found {value!r}; write '[a, b]' or one '- ...' a line")
    return tuple(str(_scalar(str, item, f"{path}[{index}]")) for index, item in enumerate(value))


def _mapping(cls: type, value: object, path: str, known: Sequence[str]) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must be a mapping, found {value!r}; write 'pattern: {{key: value}}'")
    entries: dict[str, object] = {}
    for key, item in value.items():
        name = str(_scalar(str, key, f"a key of {path}"))
        entries[name] = _dataclass(cls, item, f"{path}.{name}", known)
    return entries
