"""Whether a checkpoint's head and embedding are one tensor, whatever its configuration says.

A fine-tuned head may be stored beside the embedding under a configuration that still ties the two. transformers uses
both where they differ, and so does this project: what counts is the files.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ptq.errors import PtqError
from ptq.formats.staging import read_json
from ptq.models.names import SourceNames, tied_names

CHUNK_BYTES = 16 * 1024**2  # of either tensor in memory at a time
FLAG = "tie_word_embeddings"


class _Stored(NamedTuple):
    """One tensor of an opened file; its values are read slice by slice."""

    file: Any
    shape: tuple[int, ...]


def believe_files(config: Any, directory: Path, build: Callable[[Any], nn.Module]) -> None:
    """Take ``tie_word_embeddings`` back where the files hold two tensors of different values for one that is shared.

    Values are read only where there are two. What is wrong with files or configuration is left to those who load them.

    Args:
        config: a transformers configuration; changed in place.
        directory: where its safetensors are.
        build: makes the model of a configuration without its weights.
    """
    if not any(getattr(level, FLAG, False) for level in levels(config)):
        return
    try:
        with ExitStack() as files:
            apart = _stored_apart(config, open_tensors(directory, files), build)
    except (PtqError, SafetensorError, OSError):
        return
    if apart:
        untie(config)


def untie(config: Any) -> None:
    """Let a configuration say that its embeddings are not tied."""
    for level in levels(config):
        if getattr(level, FLAG, False):
            setattr(level, FLAG, False)


def state_ties(config: Any, settings: dict[str, Any]) -> None:
    """Let ``settings``, the contents of a config.json that is to be written, say false where the configuration does."""
    inner = levels(config)[-1]
    nested = [(inner, value) for key, value in settings.items() if getattr(config, key, None) is inner]
    for level, stated in [(config, settings), *nested]:
        if isinstance(stated, dict) and getattr(level, FLAG, None) is False:
            stated[FLAG] = False


def levels(config: Any) -> list[Any]:
    """The configurations that may say that embeddings are tied: of the whole, and of its language model."""
    try:
        inner = config.get_text_config()
    except ValueError:  # of several, none is the one that matters
        return [config]
    return [config] if inner is config else [config, inner]


def open_tensors(directory: Path, files: ExitStack) -> dict[str, _Stored]:
    """Every tensor of the checkpoint's files, none read."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    paths = [single] if single.is_file() else sorted(filter(Path.is_file, directory.glob("*.safetensors")))
    if not single.is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, Mapping) else set()
        paths = [path for path in paths if path.name in shards]
    stored = {}
    for path in paths:
        file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
        stored.update({name: _Stored(file, tuple(file.get_slice(name).get_shape())) for name in file.keys()})  # noqa: SIM118
    return stored


def _stored_apart(config: Any, stored: Mapping[str, _Stored], build: Callable[[Any], nn.Module]) -> bool:
    """Whether any two parameters that the configuration ties are there twice, and differ."""
    rows = getattr(levels(config)[-1], "vocab_size", None)
    as_wide = [entry.shape for entry in stored.values() if len(entry.shape) == 2 and entry.shape[0] == rows]
    if len(as_wide) == len(set(as_wide)):  # no two that could be an embedding and its head: no need for a model
        return False
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the float model is built
    model = build(config)
    tied = tied_names(model)
    model.all_tied_weights_keys = {}  # type: ignore[assignment]  # an attribute of transformers' own
    names = SourceNames(model, stored)  # every parameter by what is stored for itself
    pairs = [(names.find(name), names.find(origin)) for name, origin in tied.items()]
    return any(one and other and one != other and _differ(stored, one, other) for one, other in pairs)


def _differ(stored: Mapping[str, _Stored], one: str, other: str) -> bool:
    shape = stored[one].shape
    if shape != stored[other].shape or not shape:
        return False  # who loads them says so
    slices = [stored[name].file.get_slice(name) for name in (one, other)]
    step = max(1, CHUNK_BYTES // (8 * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        first, second = (part[start : start + step] for part in slices)
        if first.dtype == second.dtype:
            same = torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
        else:
            same = torch.equal(first.double(), second.double())
        if not same:
            return True
    return False
