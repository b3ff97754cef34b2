"""Where configurations are, and where the files they name are."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ptq.errors import ConfigError
from ptq.schema import suggestion

# In the repository a link to configs/ at its root, so that a wheel carries these files as package data.
SHIPPED = Path(__file__).parent / "configs"


def resolve_config_path(name: str | Path) -> Path:
    """The configuration file ``name``; a bare name is looked for in the working directory, then in ``configs/``."""
    path = Path(expanded(str(name)))
    bare = len(path.parts) == 1 and not path.is_absolute()
    tried = [path, SHIPPED / path] if bare else [path]
    for candidate in tried:
        if candidate.is_file() or candidate.is_fifo() or str(candidate) == os.devnull or _is_terminal(candidate):
            return candidate  # a pipe will do, as in --config <(...)
    if directory := next((candidate for candidate in tried if candidate.is_dir()), None):
        raise ConfigError(f"a configuration must be a file of YAML; {directory} is a directory: name a file in it")
    shipped = sorted(file.name for file in SHIPPED.glob("*.yaml"))
    raise ConfigError(
        f"no configuration file at {_places(tried)}"
        f"{suggestion(path.name, shipped)}; the ones that come with ptq are {', '.join(shipped)}"
    )


def _is_terminal(path: Path) -> bool:
    if not path.is_char_device():
        return False
    with path.open("rb", buffering=0) as device:
        return device.isatty()


def config_text(name: str | Path) -> tuple[Path, str]:
    """A configuration file, found as `resolve_config_path` does, and what it holds."""
    file = resolve_config_path(name)
    try:
        return file, file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} must be a readable UTF-8 file, found: {error}") from error


def expanded(name: str) -> str:
    """A path or the name of a model on the hub, with the home directory for ``~``. Raises ConfigError for no home."""
    if not name.startswith("~"):
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{name} must begin with a home directory that there is, found none: write it out") from error


def search_roots(config_file: Path) -> list[Path]:
    """Directories from which the relative paths in ``config_file`` count: the working directory comes first."""
    shipped = SHIPPED.resolve()
    return [Path(), shipped.parent] if config_file.resolve().parent == shipped else [Path()]


def with_variables(name: str, key: str) -> str:
    """A path with the values of ``$NAME`` and ``${NAME}`` in it, as a shell has them; ``key`` is for the error."""
    for found in re.finditer(r"\$(?:(\w+)|\{(\w+)\})", name, re.ASCII):
        if (variable := found[1] or found[2]) not in os.environ:
            raise ConfigError(
                f"{key} must name environment variables that are set; {name!r} has {found[0]}, which is not: set "
                f"{variable}, or write the path itself"
            )
    return os.path.expandvars(name)


def find_directory(name: str, roots: Sequence[Path]) -> str | None:
    """The directory ``name`` below the first of ``roots`` that has it."""
    return next((str(path) for root in roots if (path := root / expanded(name)).is_dir()), None)


def find_files(names: Sequence[str], key: str, roots: Sequence[Path]) -> tuple[str, ...]:
    """Each file of ``names`` below the first of ``roots`` that has it; ``key`` is for the error."""
    located = []
    for name in (with_variables(name, key) for name in names):
        tried = [root / expanded(name) for root in roots]
        found = next((path for path in tried if path.is_file()), None)
        if not any(path.exists() for path in tried) and any(sign in name for sign in "*?["):
            raise ConfigError(
                f"{key} must name files that exist, found none at {_places(tried)}: patterns are not expanded, name "
                "each file"
            )
        if found is None and (other := next((path for path in tried if path.exists()), None)):
            what = "a directory" if other.is_dir() else "neither a file nor a directory"
            raise ConfigError(f"{key} must name regular files, {other.absolute()} is {what}: name files of text")
        if found is None:
            raise ConfigError(
                f"{key} must name files that exist, found none at {_places(tried)}; check the path"
                f"{counted(tried, roots)}"
            )
        located.append(str(found))
    return tuple(located)


def counted(names: Iterable[str | Path], roots: Sequence[Path]) -> str:
    """For the end of an error about paths that are not there: where relative ones count from."""
    if all(Path(name).expanduser().is_absolute() for name in names):
        return ""
    others = "".join(f" and, as this configuration comes with ptq, from {root}" for root in roots[1:])
    return f": a relative one counts from the working directory{others or ', wherever the configuration is'}"


def _places(tried: Iterable[Path]) -> str:
    """Each place once: a root may be the working directory, and an absolute path is below none."""
    found: dict[Path, str] = {}
    for path in tried:
        found.setdefault(path.resolve(), str(path.absolute()))
    return " or ".join(found.values())
