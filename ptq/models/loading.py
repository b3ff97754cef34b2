"""A model without its weights, and the weights of one module at a time from safetensors shards."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ptq.errors import ConfigError, FormatError, UnsupportedModelError
from ptq.formats.staging import read_json
from ptq.models.classes import model_of
from ptq.models.empty import empty_parameters
from ptq.models.experts import unfuse_experts
from ptq.models.hub import download
from ptq.models.names import SourceNames, retie
from ptq.models.structure import find_blocks
from ptq.models.tying import believe_files, levels, open_tensors

# What building a model raises for values that it cannot be built with; ImportError of kernels that config.json names.
_UNBUILDABLE = (LookupError, TypeError, AttributeError, AssertionError, RuntimeError, ArithmeticError, ImportError)

DEEP = 1000  # layers; to build so many takes seconds, and no known model has half of them

# Dtypes that a model can work in.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


class TensorSource(Protocol):
    """Named tensors on disk (`ptq.formats.checkpoint.CheckpointReader`)."""

    def names(self) -> Iterable[str]: ...  # noqa: D102
    def tensor(self, name: str) -> Tensor: ...  # noqa: D102


def locate(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local directory of a model: the directory itself, or the hub's files (fetched once, then from its cache).

    Without ``weights`` the shards of a hub model are not fetched.

    Raises:
        ConfigError: neither a directory nor a reachable hub model, or a revision of a directory.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"a model directory must hold config.json; {path} does not: is it the right directory?")
        if revision is not None:
            raise ConfigError(f"revision is of a model on the hub; {path} is a directory: leave revision out")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ConfigError(f"model must be a directory or a hub name like owner/name; there is no directory {model!r}")
    return download(model, revision, weights=weights)


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model directory.

    It ties no head to the embedding that the directory's files hold with values of its own.

    Raises:
        UnsupportedModelError: transformers does not know the model type.
        FormatError: a value in it that transformers refuses, or more layers than the files hold tensors.
    """
    config = _parse_config(directory, trust_remote_code)
    _require_layers(config, directory)

    def build(changed: Any) -> nn.Module:
        return build_skeleton(changed, torch.float32, trust_remote_code=trust_remote_code)

    believe_files(config, directory, build)
    return config


def _require_layers(config: Any, directory: Path) -> None:
    """Raise FormatError for more layers than there are tensors: to build a million of them takes hours."""
    layers = getattr(levels(config)[-1], "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= DEEP:
        return
    try:
        with ExitStack() as files:
            held = len(open_tensors(directory, files))
    except (FormatError, SafetensorError, OSError):  # who reads the files says so
        return
    if 0 < held < layers:
        raise FormatError(
            f"num_hidden_layers in {directory / 'config.json'} must be what the files beside it hold; it is {layers}, "
            f"and they have {held} tensors: correct it, or fetch the files again"
        )


def _parse_config(directory: Path, trust_remote_code: bool) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    read_json(directory / "config.json")  # transformers says less of what is no JSON, or no object
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise FormatError(
            f"{directory / 'config.json'} must describe a model; transformers refuses it: {_sentence(error)}: correct "
            "the value, or fetch the file again"
        ) from error
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            f"{directory / 'config.json'} must describe a model transformers knows: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model directory, with ``embedding_rows``: ids from there on, the model cannot embed.

    Raises:
        UnsupportedModelError: the directory holds none.
        FormatError: its files do not hold what they should.
    """
    from transformers import AutoTokenizer

    required = f"{directory / 'tokenizer.json'} and tokenizer_config.json must be a tokenizer's"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            f"a model directory must hold its tokenizer; loading the one in {directory} failed: "
            f"{str(error).splitlines()[0]}: copy tokenizer.json and tokenizer_config.json beside config.json"
        ) from error
    except Exception as error:
        # The library of tokenizer.json raises nothing more special.
        if type(error) is not Exception and not isinstance(error, TypeError | AttributeError | RecursionError):
            raise
        raise FormatError(f"{required}; transformers found: {_sentence(error)}: fetch both again") from error
    if not isinstance(tokenizer.model_max_length, int | float):
        found = repr(tokenizer.model_max_length)
        raise FormatError(f"{required}; model_max_length must be a number, found {found}: fetch both again")
    config = _parse_config(directory, trust_remote_code)
    tokenizer.embedding_rows = getattr(config.get_text_config(), "vocab_size", None)
    return tokenizer


def _sentence(error: Exception) -> str:
    """What a library said, on one line; a KeyError says the key alone."""
    said = " ".join(str(error).split()).removesuffix(".")
    return f"there is no {said}" if isinstance(error, KeyError) else said


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration with its parameters on ``meta``; buffers are real.

    Of the class that the configuration names where transformers has it, else its causal language model.

    Fused experts are taken apart (`ptq.models.experts`).

    Raises:
        UnsupportedModelError: transformers has no causal language model for the configuration, or it has no decoder
            blocks, or experts in an unknown layout.
        FormatError: a value of the configuration that no model can be built with.
    """
    try:
        with empty_parameters():
            model = model_of(config, dtype, trust_remote_code)
    except ValueError as error:
        raise UnsupportedModelError(
            f"the model must be a causal language model of transformers; {type(config).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except _UNBUILDABLE as error:
        if isinstance(error, ImportError) and error.__cause__ is not None:
            raise  # a module could not be loaded, or its loading was interrupted
        raise FormatError(
            f"config.json must describe a model that can be built; {type(config).__name__} of "
            f"{getattr(config, 'name_or_path', '') or 'this model'}: {_sentence(error)}: correct the value, or fetch "
            "the file again"
        ) from error
    built: nn.Module = model.eval()
    unfuse_experts(built.get_submodule(find_blocks(built)))
    return built


def model_dtype(config: Any, requested: str | torch.dtype) -> torch.dtype:
    """The dtype a run works in: as asked, or with ``auto`` the checkpoint's own (float32 where it names none).

    Raises:
        ConfigError: something else is asked for.
        FormatError: the checkpoint names something else.
    """
    asked = str(requested).removeprefix("torch.")
    if asked in DTYPES:
        return DTYPES[asked]
    if asked != "auto":
        raise ConfigError(
            f"dtype must be auto, {', '.join(DTYPES)} or the torch.dtype of one of these names; found {requested!r}"
        )
    own = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    if own not in DTYPES:
        raise FormatError(
            f"the dtype in config.json must be one of {', '.join(DTYPES)}; found {own!r}: correct it, or name a dtype"
        )
    return DTYPES[own]


def working_dtype(model: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one parameter in a model that works in ``dtype``: some models keep a few in float32."""
    if not value.is_floating_point():
        return value.dtype
    kept: set[str] = set()
    if dtype != torch.float32:
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept) else dtype


def check_shape(name: str, expected: Sequence[int], found: Sequence[int]) -> None:
    """Whether a tensor of a checkpoint fits its parameter.

    Raises:
        FormatError: it does not.
    """
    if tuple(expected) != tuple(found):
        raise FormatError(
            f"{name} must have the model's shape {tuple(expected)}; the checkpoint has {tuple(found)}: "
            "config.json and the shards do not belong together"
        )


def check_floating(name: str, expected: torch.dtype, found: torch.dtype) -> None:
    """Whether a tensor of a checkpoint holds numbers that can stand for a float parameter as they are.

    Raises:
        FormatError: integers or 8-bit floats, which are codes of a quantization that config.json does not describe.
    """
    if expected.is_floating_point and (not found.is_floating_point or found.itemsize == 1):
        raise FormatError(
            f"{name} must hold floating-point numbers of 16 bits or more; the checkpoint has {found}: its config.json "
            "lacks the quantization_config that says how to read it, or the shards are another checkpoint's"
        )


def load_module(
    model: nn.Module,
    path: str,
    source: TensorSource,
    names: SourceNames,
    *,
    device: torch.device,
    dtype: torch.dtype,
    skip: Callable[[str], bool] = lambda name: False,
) -> None:
    """Read the parameters and persistent buffers below ``path`` and put them on ``device`` (buffers too).

    Tied parameters are read once. A persistent buffer that the checkpoint lacks keeps the model's own value. ``skip``
    names those (by full name) that are loaded by other means.

    Raises:
        FormatError: a tensor is missing, has another shape than the model's, or integers where it has floats.
    """
    module = model.get_submodule(path)
    persistent = set(module.state_dict())
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for local, current in [*parameters.items(), *module.named_buffers()]:
        full = f"{path}.{local}" if path else local
        if skip(full) or names.is_tied(full):
            continue
        if (local not in parameters and names.find(full) is None) or local not in persistent:
            if current.device != device:
                _put(module, local, current.to(device))
            continue
        value = names.read(full, source)
        check_shape(names.of_parameter(full), current.shape, value.shape)
        check_floating(names.of_parameter(full), current.dtype, value.dtype)
        target = working_dtype(model, full, value, dtype)
        # A copy: the file's memory map must not see a solver's changes.
        _put(module, local, value.to(device, target, copy=True))
    names.forget()
    retie(model)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def _put(module: nn.Module, local: str, value: Tensor) -> None:
    """A tensor as the parameter or buffer at a path; a parameter's class and what is noted on it stay."""
    path, _, leaf = local.rpartition(".")
    owner = module.get_submodule(path)
    old = owner._parameters.get(leaf)
    if old is None:
        owner._buffers[leaf] = value
        return
    owner._parameters[leaf] = type(old)(value, requires_grad=False)
    owner._parameters[leaf].__dict__.update(old.__dict__)


def unload_module(module: nn.Module) -> None:
    """Give the memory of a module's parameters back; its structure stays."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
