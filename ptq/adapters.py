"""LoRA adapters (PEFT) on packed models: which layers get one, training-ready configurations, a merged dense copy."""

import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ptq.adapter_merge import check_mergeable, check_values, check_whole, dense_tensors, write_description
from ptq.errors import ConfigError
from ptq.formats.checkpoint import ShardWriter, read_json, staged_directory
from ptq.formats.staging import output_path, require_writable
from ptq.models.experts import experts_of
from ptq.models.loading import build_skeleton
from ptq.models.structure import linears, output_head
from ptq.nn.fuse import FusedLinear
from ptq.nn.linear import QuantLinear
from ptq.runtime import load_weights, open_checkpoint

ALL_LINEAR = "all-linear"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def lora_config(model: nn.Module, target_modules: str | list[str] = ALL_LINEAR, **options: Any) -> Any:
    """A ``peft.LoraConfig`` with which ``peft.get_peft_model`` puts adapters on QuantLinears.

    Args:
        model: from `ptq.load`, or with QuantLinears from anywhere else. Dense Linears in it get adapters as usual.
        target_modules: names or a pattern, as PEFT has it; the default is every Linear but the output head.
        options: everything else of ``LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``, ...

    Raises:
        ConfigError: PEFT is not installed, the model was loaded with ``fuse=True``, a variant of LoRA (DoRA, PiSSA,
            QALoRA, aLoRA and the like), or target_parameters in a packed layer.
    """
    require_peft()
    from peft import LoraConfig

    from ptq.nn.lora import refuse_variants

    refuse_variants(options)  # before PEFT, which knows some of them by wrong types alone
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
        ConfigError: no adapter there, damaged or not a LoRA adapter, one that was trained on another model, or as for
            `lora_config`.
        FormatError: adapter_config.json is damaged.
    """
    require_peft()
    return _load(model, Path(adapter).expanduser(), trainable)[0]


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
    the packed model, the adapter and one dense weight, or one of a layer's stacks of experts where the model's class
    reads nothing else.

    Args:
        checkpoint: directory or hub name.
        adapter: directory of a LoRA adapter.
        out: directory for the copy, which plain transformers loads.
        dtype: of the copy; ``auto`` is the checkpoint's.
        overwrite: replace an existing checkpoint directory.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: as for `load_adapter`; ``out`` is in the way or is the checkpoint; the adapter holds more than
            LoRA on Linears, is on a Linear whose weight the checkpoint shares with another module, or makes a weight
            that the copy's dtype cannot hold.
        FormatError: a damaged checkpoint or adapter_config.json.
    """
    require_peft()
    final = output_path(Path(out), "--out")
    require_writable(final, overwrite, "--out")
    source = open_checkpoint(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    if final == source.directory.resolve():
        raise ConfigError(f"the merged copy must go to another directory than the checkpoint's; found {out} for both")
    load_weights(source, "", torch.device("cpu"))
    adapted, tensors = _load(source.model, Path(adapter).expanduser(), False)
    check_mergeable(adapted, adapter)
    check_whole(source, tensors, adapter)
    skeleton = build_skeleton(source.hf_config, source.dtype, trust_remote_code=trust_remote_code)
    with staged_directory(final, overwrite) as staged:
        writer = ShardWriter(staged)
        for name, value in dense_tensors(source, adapted, skeleton):
            writer.add({name: value})
        writer.finish()
        write_description(source, staged)
    return final


def require_peft() -> None:
    """Raises ConfigError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError("adapters need the package peft, which is not installed: pip install peft") from error


def _load(model: nn.Module, adapter: Path, trainable: bool) -> tuple[Any, dict[str, Tensor]]:
    """A model with a saved adapter on it, and what the adapter's file holds."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    config = _registered(_saved_config(adapter), model)
    if not any((adapter / name).is_file() for name in WEIGHTS):  # PEFT would look for it on the hub
        raise ConfigError(
            f"an adapter must have its tensors in {' or '.join(WEIGHTS)}; {adapter} has neither: save or fetch it again"
        )
    try:
        tensors = load_peft_weights(str(adapter), device="cpu")
    except (SafetensorError, pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"an adapter's tensors must be readable; those of {adapter} are not: {_sentence(error)}: the file may be "
            "incomplete, save or fetch it again"
        ) from error
    check_values(tensors, adapter)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a name that is about to go
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error here
            adapted = PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(
            f"an adapter must fit the model that it is put on; PEFT cannot put {adapter} there: {_sentence(error)}: "
            "take the model that it was trained on, or a packed copy of that"
        ) from error
    tensors = _renamed(adapted, tensors)
    _check_names(adapted, set(tensors), adapter)
    return adapted, tensors


def _renamed(adapted: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names that PEFT reads them by: old ones may be as transformers 4 spelled them."""
    from peft.utils import transformers_weight_conversion as conversion

    if not hasattr(getattr(adapted, "config", None), "model_type"):
        return tensors
    convert = conversion.convert_peft_adapter_state_dict_for_transformers
    return dict(convert(model=adapted, peft_config=adapted.peft_config["default"], adapter_state_dict=dict(tensors)))


def _saved_config(adapter: Path) -> Any:
    from peft import PeftConfig

    from ptq.nn.lora import refuse_variants

    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"an adapter must be a directory with adapter_config.json, as save_pretrained of PEFT writes it; {adapter} "
            "is not"
        )
    refuse_variants(read_json(adapter / "adapter_config.json"))
    try:
        return PeftConfig.from_pretrained(str(adapter))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"adapter_config.json must be as save_pretrained of PEFT writes it; PEFT cannot read the one of {adapter}: "
            f"{_sentence(error)}: save or fetch it again"
        ) from error


def _check_names(adapted: Any, found: set[str], adapter: Path) -> None:
    """PEFT itself goes on without what is missing, and says nothing of what is left over."""
    from peft import get_peft_model_state_dict

    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    missing, left = needed - found, found - needed - set(adapted.state_dict())  # embeddings may lie beside it whole
    if missing or left:
        lacks = f"it lacks {len(missing)} such as {_some(missing)}" if missing else ""
        over = f"{len(left)} of its tensors have no place there, such as {_some(left)}" if left else ""
        raise ConfigError(
            f"an adapter must hold the tensors of the layers that it is put on, and no more; {adapter} does not: "
            f"{'; '.join(filter(None, (lacks, over)))}: take the model that it was trained on, or save it again"
        )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:2])


def _sentence(error: Exception) -> str:
    """PEFT's and torch's messages have lines and lines; the first two say what does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}".removesuffix(".")


def _registered(config: Any, model: nn.Module) -> Any:
    """Check a configuration and tell it what to put over a QuantLinear."""
    from ptq.nn.lora import LoraQuantLinear

    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"an adapter on packed weights must be of type LORA; found {config.peft_type.value}")
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise ConfigError(
            "adapters need every projection by itself; this model was loaded with fuse=True: load it without"
        )
    for name in getattr(config, "target_parameters", None) or ():
        _check_parameter(name, model)
    if experts_of(model):
        _leave_experts_apart()
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def _check_parameter(name: str, model: nn.Module) -> None:
    """PEFT passes over the name of a weight that is no parameter without a word."""
    for found, module in model.named_modules():
        path = found.removesuffix(".base_layer")
        if isinstance(module, QuantLinear) and f".{path}.weight".endswith(f".{name}"):
            raise ConfigError(
                f"target_parameters must name parameters of layers that are not packed; {name} is in {path}, which is: "
                f"name {path} in target_modules instead"
            )


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

    head = output_head(model)
    adapted = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, LoraLayer))
    modules = {path: module for path, module in model.named_modules() if not path.startswith(adapted)}
    products = {path for path, module in linears(model) if isinstance(module, nn.Linear)}  # some Linears do more
    fit = {path for path, m in modules.items() if path in products or isinstance(m, QuantLinear | LoraLayer)}
    paths = [path for path, module in modules.items() if path in fit and module is not head]
    last = {path.rpartition(".")[2] for path in paths}
    meant = [path for path in modules if path.rpartition(".")[2] in last]
    return sorted(last) if set(meant) == set(paths) else paths
