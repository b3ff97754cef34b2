"""A model without its weights, and the weights of one module at a time from safetensors shards."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptq.errors import ConfigError, FormatError, UnsupportedModelError


class TensorSource(Protocol):
    """Named tensors on disk (`ptq.formats.checkpoint.CheckpointReader`)."""

    def names(self) -> Iterable[str]: ...  # noqa: D102
    def tensor(self, name: str) -> Tensor: ...  # noqa: D102


def locate(model: str, revision: str | None = None) -> Path:
    """The local directory of a model: the directory itself, or the hub's files (fetched once, then from its cache).

    Raises:
        ConfigError: neither a directory nor a reachable hub model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"a model directory must hold config.json; {path} does not: is it the right directory?")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ConfigError(f"model must be a directory or a hub name like owner/name; there is no directory {model!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model must be a local directory or a hub model this machine may read; {model!r} is no directory and "
            f"the hub answered: {str(error).splitlines()[0]}. Check the name, the network and your token"
        ) from error


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        UnsupportedModelError: transformers does not know the model type.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            f"{directory / 'config.json'} must describe a model transformers knows: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UnsupportedModelError: the directory holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            f"a model directory must hold its tokenizer; loading the one in {directory} failed: "
            f"{str(error).splitlines()[0]}: copy tokenizer.json and tokenizer_config.json beside config.json"
        ) from error


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a configuration with its parameters on ``meta``; buffers are real.

    Raises:
        UnsupportedModelError: transformers has no causal language model for the configuration.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedModelError(
            f"the model must be a causal language model of transformers; {type(config).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    built: nn.Module = model.eval()
    return built


def model_dtype(config: Any, requested: str) -> torch.dtype:
    """The dtype a run works in: as asked, or with ``auto`` the checkpoint's own (float32 where it names none)."""
    if requested != "auto":
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
    own = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, own) if isinstance(own, str) else own


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Parameters that share another parameter's storage: name to the name it is loaded under."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, Mapping) else {}


class SourceNames:
    """Which tensor of a checkpoint holds which parameter of a model.

    The names agree but for the base model's prefix, which some checkpoints leave out or add.
    """

    def __init__(self, model: nn.Module, source: Iterable[str]) -> None:
        self._source = set(source)
        self._tied = tied_names(model)
        prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
        wanted = [name for name, _ in model.named_parameters()]
        spellings = {
            "same": lambda n: n,
            "shorter": lambda n: n.removeprefix(prefix),
            "longer": lambda n: prefix + n,
        }
        hits = {key: sum(spell(n) in self._source for n in wanted) for key, spell in spellings.items()}
        self._spell = spellings[max(hits, key=lambda key: hits[key])]

    def of_module(self, path: str) -> str:
        """A module's name as the checkpoint spells it."""
        return self._spell(path)

    def of_parameter(self, name: str) -> str:
        """The tensor that holds a parameter.

        Raises:
            FormatError: the checkpoint has no such tensor.
        """
        name = self._tied.get(name, name)
        for candidate in (self._spell(name), name):
            if candidate in self._source:
                return candidate
        near = get_close_matches(self._spell(name), self._source, n=1)
        hint = f"; the nearest name in it is {near[0]}" if near else ""
        raise FormatError(
            f"the checkpoint must hold every parameter of the model; {self._spell(name)} is missing{hint}: "
            "the download may be incomplete, or the checkpoint belongs to another architecture"
        )

    def is_tied(self, name: str) -> bool:
        """Whether the parameter shares another one's storage."""
        return name in self._tied


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

    ``skip`` names those (by full name) that are loaded by other means.

    Raises:
        FormatError: a tensor is missing or has another shape than the model's.
    """
    from accelerate.utils import set_module_tensor_to_device

    module = model.get_submodule(path)
    persistent = set(module.state_dict())
    for local, current in [*module.named_parameters(), *module.named_buffers()]:
        full = f"{path}.{local}" if path else local
        if skip(full):
            continue
        if local not in persistent:
            if current.device != device:
                set_module_tensor_to_device(module, local, device)
            continue
        name = names.of_parameter(full)
        value = source.tensor(name)
        if value.shape != current.shape:
            raise FormatError(
                f"{name} must have the model's shape {tuple(current.shape)}; the checkpoint has {tuple(value.shape)}: "
                "config.json and the shards do not belong together"
            )
        target = dtype if value.is_floating_point() else value.dtype
        # A copy: the file's memory map must not see a solver's changes.
        set_module_tensor_to_device(module, local, device, value=value.to(device, target, copy=True), dtype=target)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def unload_module(module: nn.Module) -> None:
    """Give the memory of a module's parameters back; its structure stays."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
