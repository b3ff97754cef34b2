"""LoRA adapters (PEFT) on packed models: which layers get one, training-ready configurations, a merged dense copy."""

import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import ConfigError
from ptq.formats.checkpoint import ShardWriter, atomic_write_text, read_json, staged_directory
from ptq.formats.staging import CHAT_TEMPLATES, output_path, require_writable
from ptq.models.experts import experts_of
from ptq.models.loading import build_skeleton, working_dtype
from ptq.models.structure import is_transposed, linears
from ptq.models.tying import state_ties
from ptq.nn.fuse import FusedLinear
from ptq.nn.linear import QuantLinear
from ptq.pipeline import NOT_COPIED
from ptq.runtime import Checkpoint, load_weights, open_checkpoint

ALL_LINEAR = "all-linear"
INITIAL = (True, False, "gaussian")  # what does not look into the base weight


def lora_config(model: nn.Module, target_modules: str | list[str] = ALL_LINEAR, **options: Any) -> Any:
    """A ``peft.LoraConfig`` with which ``peft.get_peft_model`` puts adapters on QuantLinears.

    Args:
        model: from `ptq.load`, or with QuantLinears from anywhere else. Dense Linears in it get adapters as usual.
        target_modules: names or a pattern, as PEFT has it; the default is every Linear but the output head.
        options: everything else of ``LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``, ...

    Raises:
        ConfigError: PEFT is not installed, the model was loaded with ``fuse=True``, or a variant of LoRA that needs
            the dense weight (DoRA, PiSSA and the like).
    """
    require_peft()
    from peft import LoraConfig

    targets = _all_linear(model) if target_modules == ALL_LINEAR else target_modules
    task = {"task_type": "CAUSAL_LM"} if hasattr(model, "prepare_inputs_for_generation") else {}
    return _registered(LoraConfig(target_modules=targets, **{**task, **options}), model)


def load_adapter(model: nn.Module, adapter: str | Path, *, trainable: bool = False) -> Any:
    """Put a saved adapter on a model: a ``peft.PeftModel``.

    Args:
        model: from `ptq.load`.
        adapter: directory that ``save_pretrained`` of a PEFT model wrote.
        trainable: go on training it.

    Raises:
        ConfigError: no adapter there, not a LoRA adapter, or as for `lora_config`.
    """
    require_peft()
    from peft import PeftConfig, PeftModel

    directory = Path(adapter).expanduser()
    if not (directory / "adapter_config.json").is_file():
        raise ConfigError(
            f"an adapter must be a directory with adapter_config.json, as save_pretrained of PEFT writes it; {adapter} "
            "is not"
        )
    config = _registered(PeftConfig.from_pretrained(str(directory)), model)
    with warnings.catch_warnings():  # PEFT asks transformers for a name that is about to go
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, str(directory), config=config, is_trainable=trainable)


def merge(
    checkpoint: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a dense copy of a packed (or float) checkpoint with an adapter added to its weights.

    Each weight is dequantized in float32, the adapter's product is added, and the sum is rounded once. Memory holds
    the packed model, the adapter and one dense weight.

    Args:
        checkpoint: directory or hub name.
        adapter: directory of a LoRA adapter.
        out: directory for the copy, which plain transformers loads.
        dtype: of the copy; ``auto`` is the checkpoint's.
        overwrite: replace an existing checkpoint directory.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: as for `load_adapter`; ``out`` is in the way or is the checkpoint; the adapter holds more than
            LoRA on Linears, or is on a Linear whose weight the checkpoint shares with another module.
        FormatError: a damaged checkpoint.
    """
    require_peft()
    final = output_path(Path(out), "--out")
    require_writable(final, overwrite, "--out")
    source = open_checkpoint(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    if final == source.directory.resolve():
        raise ConfigError(f"the merged copy must go to another directory than the checkpoint's; found {out} for both")
    load_weights(source, "", torch.device("cpu"))
    adapted = load_adapter(source.model, adapter)
    _check_mergeable(adapted.peft_config["default"], adapter)
    skeleton = build_skeleton(source.hf_config, source.dtype, trust_remote_code=trust_remote_code)
    with staged_directory(final, overwrite) as staged:
        writer = ShardWriter(staged)
        for name, value in _dense_tensors(source, adapted.get_base_model(), skeleton):
            writer.add({name: value})
        writer.finish()
        _write_description(source, staged)
    return final


def require_peft() -> None:
    """Raises ConfigError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError("adapters need the package peft, which is not installed: pip install peft") from error


def _registered(config: Any, model: nn.Module) -> Any:
    """Check a configuration and tell it what to put over a QuantLinear."""
    from ptq.nn.lora import LoraQuantLinear

    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"an adapter on packed weights must be of type LORA; found {config.peft_type.value}")
    for key, allowed in (("init_lora_weights", INITIAL), ("use_dora", (False,))):
        if getattr(config, key) not in allowed:
            raise ConfigError(
                f"an adapter on packed weights must not need the dense ones: {key} must be "
                f"{' or '.join(map(repr, allowed))}, found {getattr(config, key)!r}"
            )
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise ConfigError(
            "adapters need every projection by itself; this model was loaded with fuse=True: load it without"
        )
    if experts_of(model):
        _leave_experts_apart()
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def _leave_experts_apart() -> None:
    """Keep PEFT from rewriting adapters of models whose experts are Linears.

    For some model types it takes gate_proj, up_proj and down_proj to mean the stacked parameters that transformers
    keeps, in the configuration and in an adapter's file: neither the experts nor dense Linears of these names would get
    an adapter. It goes by the model type of config.json alone, so there is no other place to tell it.
    """
    from peft.utils import transformers_weight_conversion as conversion

    for name, result in (
        ("convert_peft_config_for_transformers", "peft_config"),
        ("convert_peft_adapter_state_dict_for_transformers", "adapter_state_dict"),
    ):
        original = getattr(conversion, name)
        if not hasattr(original, "__wrapped__"):
            setattr(conversion, name, _unless_apart(original, result))


def _unless_apart(convert: Callable[..., Any], result: str) -> Callable[..., Any]:
    """A conversion of PEFT that hands its argument ``result`` back as it is for a model whose experts are Linears."""

    @wraps(convert)
    def converted(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(convert).bind(*args, **kwargs).arguments
        return given[result] if experts_of(given["model"]) else convert(*args, **kwargs)

    return converted


def _all_linear(model: nn.Module) -> list[str]:
    """Every Linear but the output head: by last names where these mean no other module, otherwise by paths."""
    from peft.tuners.lora import LoraLayer

    head = getattr(model, "get_output_embeddings", lambda: None)()
    adapted = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, LoraLayer))
    modules = {path: module for path, module in model.named_modules() if not path.startswith(adapted)}
    products = {path for path, module in linears(model) if isinstance(module, nn.Linear)}  # some Linears do more
    fit = {path for path, m in modules.items() if path in products or isinstance(m, QuantLinear | LoraLayer)}
    paths = [path for path, module in modules.items() if path in fit and module is not head]
    last = {path.rpartition(".")[2] for path in paths}
    meant = [path for path in modules if path.rpartition(".")[2] in last]
    return sorted(last) if set(meant) == set(paths) else paths


def _check_mergeable(config: Any, adapter: str | Path) -> None:
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"):
        if getattr(config, key, None):
            raise ConfigError(
                f"an adapter can be merged if it is LoRA on Linears alone; {adapter} has {key}: "
                f"{getattr(config, key)}: keep it beside the packed model with ptq.adapters.load_adapter"
            )


def _dense_tensors(source: Checkpoint, model: nn.Module, skeleton: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense copy under the checkpoint's names: what is not packed, then the Linears."""
    from peft.tuners.lora import LoraLayer

    from ptq.nn.lora import merged_weights

    adapted = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    float_names = {}  # stored tensors that an adapter changes
    for path, layer in adapted.items():
        for leaf in ("weight", "bias"):
            if getattr(layer.get_base_layer(), leaf) is not None and not (path in source.schemes and leaf == "weight"):
                float_names[_own_tensor(source, f"{path}.{leaf}")] = path, leaf
    packed = {source.names.of_module(path) for path in source.schemes}
    for name in source.reader.names():
        owner, _, leaf = name.rpartition(".")
        if owner in packed and leaf != "bias":
            continue
        value = source.reader.tensor(name)
        dtype = working_dtype(source.model, name, value, source.dtype)
        if name in float_names:
            path, leaf = float_names[name]
            value = merged_weights(adapted[path])[leaf]
        yield name, value.to(dtype)
    for path in source.schemes:
        module: Any = model.get_submodule(path)
        weight = merged_weights(module)["weight"] if path in adapted else module.dequantize(torch.float32)
        turned = is_transposed(skeleton.get_submodule(path))  # Conv1D holds [K, N]
        yield f"{source.names.of_module(path)}.weight", (weight.T if turned else weight).to(source.dtype)


def _own_tensor(source: Checkpoint, name: str) -> str:
    stored = source.names.find(name)
    if stored is None or source.names.is_tied(name):
        raise ConfigError(
            f"an adapter can be merged into a tensor that belongs to its Linear alone; {name} is shared with another "
            "module or part of a fused one: leave it out of target_modules, or keep the adapter beside the model"
        )
    return stored


def _write_description(source: Checkpoint, staged: Path) -> None:
    skipped = (*NOT_COPIED, "ptq_config.yaml")
    for entry in source.directory.iterdir():
        if entry.is_file() and not any(fnmatchcase(entry.name, pattern) for pattern in skipped):
            shutil.copyfile(entry, staged / entry.name)
    if (source.directory / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source.directory / CHAT_TEMPLATES, staged / CHAT_TEMPLATES)
    settings = read_json(source.directory / "config.json")
    for key in ("quantization_config", "torch_dtype"):
        settings.pop(key, None)
    settings["dtype"] = str(source.dtype).removeprefix("torch.")
    state_ties(source.hf_config, settings)
    atomic_write_text(staged / "config.json", json.dumps(settings, indent=2) + "\n")
