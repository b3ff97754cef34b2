"""YAML text to nested mappings, and ``key=value`` overrides on top of them."""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from ptq.errors import ConfigError

# A NUL and halves of surrogate pairs, which double-quoted text can spell.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``1e-2`` is a number and a key given twice is an error.

    Every fault is a MarkedYAMLError, which knows its line: PyYAML lets Python's own errors through.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # values before what holds them: a mapping that holds itself is refused

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            written = str(node.value)
            written = written if len(written) <= 60 else f"{written[:57]}..."
            raise yaml.MarkedYAMLError(
                problem=f"{written!r} cannot be read as {kind}", problem_mark=node.start_mark
            ) from error
        if isinstance(value, str) and _NO_TEXT.search(value):  # no file can be named so, or hold it
            raise yaml.MarkedYAMLError(
                problem="an escaped NUL or half of a surrogate pair", problem_mark=node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"a {key_node.id} as a key of a mapping", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} stands twice in one mapping", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists, and quotes a text that ``_Loader`` would read as a number."""


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)

# PyYAML follows YAML 1.1, where a number with an exponent needs a dot and a sign. Reader and writer get the same rule:
# a writer without it would leave the text "0E0" unquoted, which this reader takes for a number.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def unparse(tree: Any) -> str:
    """YAML that ``parse`` reads back as a value equal to ``tree``, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse(document: str, source: str) -> Any:
    """The plain value ``document`` describes; ``source`` names it in errors. Raises ConfigError naming the line."""
    try:
        return yaml.load(document, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: valid YAML is required, found: {error.problem}; correct it") from error
    except yaml.YAMLError as error:  # characters YAML forbids
        raise ConfigError(f"{source}: valid YAML is required, found: {error}; remove what it names") from error
    except RecursionError as error:
        raise ConfigError(
            f"{source}: YAML of a few levels is required, found lists or mappings nested too deeply to be read; "
            "flatten them"
        ) from error


def plain(tree: Mapping[str, Any], source: str) -> Any:
    """A mapping made in Python as if a file had held it, apart from the given one. Raises ConfigError as `parse`."""
    try:
        document = unparse(dict(tree))
    except yaml.representer.RepresenterError as error:
        found = error.args[-1]
        raise ConfigError(
            f"{source} must hold text, numbers, True, False, None, lists and dicts alone, found {found!r}: write a "
            "path as str(path), and other values as YAML would have them"
        ) from error
    return parse(document, source)


_QUOTED = ("'", '"', "|", ">", "!", "&", "*")  # texts that are not what is written


def override(tree: dict[str, Any], assignment: str) -> None:
    """Applies ``calibration.samples=64`` to ``tree`` in place; the value is YAML.

    Below ``overrides`` the key is a module path pattern, which may hold dots itself:
    ``overrides.model.layers.0={bits: 8}`` and ``overrides.model.layers.0.bits=8`` say the same.
    """
    path, equals, written = assignment.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ConfigError(f"an override must read key=value, found {assignment!r}; for example calibration.samples=64")
    value = parse(written, f"the override {assignment!r}")
    if isinstance(value, str) and "\n" not in written and not written.lstrip().startswith(_QUOTED):
        value = written.strip()  # a path with " #" in it is one, not the beginning of a comment
    if path.startswith("overrides."):
        pattern = path.removeprefix("overrides.")
        leaf: tuple[str, ...] = ()
        if not isinstance(value, dict):
            pattern, _, last = pattern.rpartition(".")
            leaf = (last,)
        keys = ("overrides", pattern, *leaf)
    else:
        keys = tuple(path.split("."))
    node = tree
    for key in keys[:-1]:
        inner = node.get(key)
        if inner is None:
            inner = node[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"the override {assignment!r} needs a mapping at {key!r}, found {inner!r}; check the key")
        node = inner
    node[keys[-1]] = value
