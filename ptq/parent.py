"""What a checkpoint's parent is called on the hub, and under which licence it stands."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptq.errors import ConfigError, FormatError
from ptq.formats.checkpoint import CheckpointReader, read_json
from ptq.yaml_tree import parse

HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# A directory of the hub's cache: models--owner--name/snapshots/commit.
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]{40})")
# Of a model card's front matter, what holds for a quantized copy as well.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def parent_of(model: str, directory: Path) -> dict[str, Any]:
    """A run's parent, for its report.

    ``name`` is its hub name (None: a local directory), ``commit`` that of the hub's cache, ``card`` what its README's
    front matter says of licence, language and task.
    """
    cached = _SNAPSHOT.search(directory.resolve().as_posix())
    name = f"{cached[1]}/{cached[2]}" if cached else None
    if name is None and not Path(model).expanduser().is_dir() and HUB_NAME.fullmatch(model):
        name = model
    matter = front_matter(directory / "README.md")
    return {
        "name": name,
        "commit": cached[3] if cached else None,
        "card": {key: matter[key] for key in CARRIED if key in matter},
    }


def recorded_parent(checkpoint: Path) -> str | None:
    """The directory or hub model that a checkpoint's ptq_config.yaml says it was made from; None if it says neither.

    A directory that is not here is neither, though ``models/tiny`` looks like a name on the hub: the report knows.
    """
    try:
        found = parse((checkpoint / "ptq_config.yaml").read_text(encoding="utf-8"), "ptq_config.yaml")
    except (OSError, ConfigError):
        return None
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, str):
        return None
    try:
        parent = read_json(checkpoint / "report.json").get("parent")
    except (FormatError, OSError):
        parent = None
    local = isinstance(parent, dict) and parent.get("name", "") is None
    known = Path(model).expanduser().is_dir() or (HUB_NAME.fullmatch(model) and not local)
    return model if known else None


def require_parent(made: CheckpointReader, parent: CheckpointReader, name: str) -> None:
    """Raise ConfigError where no matrix that both hold in float, as embeddings are, is the same: another model.

    ``name`` is how the checkpoint calls its parent; a relative path leads elsewhere from another directory.
    """
    differing = ""
    for tensor in sorted({*made.names()} & {*parent.names()}):
        dtype, shape = made.spec(tensor)
        if len(shape) == 2 and dtype.is_floating_point and parent.spec(tensor)[1] == shape:
            if torch.equal(made.tensor(tensor)[:64], parent.tensor(tensor)[:64].to(dtype)):
                return
            differing = differing or tensor
    if differing:
        raise ConfigError(
            f"the float model in {name} must be the one that {made.directory} was made from; their {differing} differ: "
            "run in the directory from which that name led to it, or export the right one by its own path"
        )


def front_matter(readme: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines ``---`` of a model card; empty where there is none, or it is not YAML."""
    if not readme.is_file():
        return {}
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = parse(match[1], str(readme)) if match else None
    except ConfigError:  # someone else's card: what cannot be read says nothing
        return {}
    return found if isinstance(found, dict) else {}
