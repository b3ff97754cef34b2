"""The dense copy of a checkpoint with a LoRA adapter in it: what can be in it, and its tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import ConfigError
from ptq.formats.checkpoint import atomic_write_text, read_json
from ptq.models.conversion import Conversions
from ptq.models.description import copy_description
from ptq.models.experts import UnfusedExperts, experts_of
from ptq.models.loading import working_dtype
from ptq.models.structure import is_transposed
from ptq.models.tying import state_ties
from ptq.nn.linear import QuantLinear
from ptq.runtime import Checkpoint

PREFIX = "base_model.model."  # of names in an adapter's file


def check_mergeable(adapted: Any, adapter: str | Path) -> None:
    """Raises ConfigError where an adapter does more than the sum of a dense weight and a product can hold."""
    from peft.tuners.lora import LoraLayer

    config, more = adapted.peft_config["default"], ""
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"):
        if getattr(config, key, None):
            more = more or f"has {key}: {getattr(config, key)}"
    for path, layer in adapted.get_base_model().named_modules():
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        if base is not None and not (isinstance(base, QuantLinear | nn.Linear) or is_transposed(base)):
            more = more or f"is over {path}, of class {type(base).__name__}"
    if more:
        raise ConfigError(
            f"an adapter can be merged if it is LoRA on Linears alone; {adapter} {more}: keep it beside the packed "
            "model with ptq.adapters.load_adapter"
        )


def check_values(tensors: dict[str, Tensor], adapter: str | Path) -> None:
    """Raises ConfigError for matrices of LoRA that are no floats, and for tensors with NaN or infinity."""
    for name, value in tensors.items():
        floats = value.is_floating_point()
        chunks = value.flatten().split(1 << 22) if floats else ()  # a saved embedding is large
        if (".lora_" in name and not floats) or not all(bool(_numbers(each).isfinite().all()) for each in chunks):
            found = "has NaN or infinity" if floats else f"is {str(value.dtype).removeprefix('torch.')}"
            raise ConfigError(
                f"an adapter must hold finite floats; {name} of {adapter} {found}: save or fetch it again"
            )


def _numbers(value: Tensor) -> Tensor:
    return value.float() if value.element_size() == 1 else value  # of float8, torch does not say what is finite


def check_whole(source: Checkpoint, tensors: dict[str, Tensor], adapter: str | Path) -> None:
    """Whether what an adapter's file holds beside LoRA, embeddings that PEFT saves whole, is as in the checkpoint.

    Raises:
        ConfigError: it was trained.
    """
    for name, value in tensors.items():
        stored = source.names.find(name.removeprefix(PREFIX).replace(".base_layer", ""))
        if ".lora_" in name or stored is None or stored.endswith("bias"):
            continue
        if not torch.equal(source.reader.tensor(stored).to(value.dtype), value):
            raise ConfigError(
                f"an adapter can be merged if all else is as in the checkpoint; {adapter} brings another {stored}: "
                "keep it beside the packed model with ptq.adapters.load_adapter"
            )


def dense_tensors(source: Checkpoint, peft_model: Any, skeleton: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense copy, mostly under the checkpoint's names: what is not packed, Linears, stacks.

    Raises:
        ConfigError: a sum with the adapter is NaN, or beyond its dtype.
    """
    from peft.tuners.lora import LoraLayer

    model = peft_model.get_base_model()
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    stacks = _stacks(source, skeleton, adapted)
    # What else an experts module has, as a norm, is no part of a stack.
    stacked = {f"{path}.{local}" for path, experts in stacks.items() for local, _, _ in experts.slices()}
    changed = _changed(source, peft_model, adapted, stacked)
    skipped = {stored for name in stacked for stored in source.names.sources(name)}
    packed = {source.names.of_module(path) for path in source.schemes}
    for name in source.reader.names():
        owner, _, leaf = name.rpartition(".")
        if name in skipped or (owner in packed and leaf != "bias"):
            continue
        value = source.reader.tensor(name)
        dtype = working_dtype(source.model, name, value, source.dtype)
        yield name, _finite(name, _dense(model, changed[name]).to(dtype)) if name in changed else value.to(dtype)
    for path in source.schemes:
        if f"{path}.weight" not in stacked:
            weight = _dense(model, f"{path}.weight")
            turned = is_transposed(skeleton.get_submodule(path))  # Conv1D holds [K, N]
            name = f"{source.names.of_module(path)}.weight"
            yield name, _finite(name, (weight.T if turned else weight).to(source.dtype))
    for path, experts in stacks.items():
        for fused, shape in experts.shapes.items():
            name = f"{path}.{fused}"
            dtype = working_dtype(source.model, name, torch.empty(0), source.dtype)
            stack = torch.empty(shape, dtype=dtype)
            for local, owner, cut in experts.slices():
                if owner == fused:
                    cut(stack).copy_(_dense(model, f"{path}.{local}"))  # what is cut out is a view
            yield name, _finite(name, stack)


def _finite(name: str, value: Tensor) -> Tensor:
    if bad := value.numel() - int(torch.isfinite(value).sum()):
        raise ConfigError(
            f"a weight with its adapter must be finite in the copy's {str(value.dtype).removeprefix('torch.')}; {name} "
            f"has {bad} of {value.numel()} values that are not: correct lora_alpha and its kin in "
            "adapter_config.json, train the adapter again, or take a --dtype that holds more"
        )
    return value


def _changed(source: Checkpoint, peft_model: Any, adapted: set[str], stacked: set[str]) -> dict[str, str]:
    """Stored tensors that the adapter changes, and the parameter of the model that each is."""
    all_biases = peft_model.peft_config["default"].bias == "all"
    changed = {}
    for name, _ in peft_model.get_base_model().named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".")
        owner, _, leaf = plain.rpartition(".")
        if "lora_" in name or plain in stacked:
            continue
        trained = all_biases and "bias" in leaf
        if trained or (owner in adapted and not (owner in source.schemes and leaf == "weight")):
            changed[_own_tensor(source, plain)] = plain
    return changed


@torch.no_grad()
def _dense(model: nn.Module, name: str) -> Tensor:
    """A parameter of a Linear with its adapter, of a packed or a float one, or any other."""
    from peft.tuners.lora import LoraLayer

    from ptq.nn.lora import merged_weights

    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    if isinstance(module, LoraLayer):
        return merged_weights(module)[leaf]
    if isinstance(module, QuantLinear) and leaf == "weight":
        return module.dequantize(torch.float32)
    return model.get_parameter(name)


def _stacks(source: Checkpoint, skeleton: nn.Module, adapted: set[str]) -> dict[str, UnfusedExperts]:
    """Experts that must be written in the stacks of the model's class.

    Those that transformers would not gather from single tensors, and those with an adapter that were stored in a stack.
    """
    conversions = Conversions(skeleton)
    found = {}
    for path, experts in experts_of(skeleton).items():
        for local, _, _ in experts.slices():
            member = f"{path}.{local}".rpartition(".")[0]
            own = member in source.schemes or source.names.find(f"{member}.weight") is not None
            gathered = conversions.gathers(f"{source.names.of_module(member)}.weight")
            if (own and not gathered) or (member in adapted and not own):
                found[path] = experts
                break
    return found


def _own_tensor(source: Checkpoint, name: str) -> str:
    stored = source.names.find(name)
    if stored is None or source.names.is_tied(name):
        raise ConfigError(
            f"an adapter can be merged into a tensor that belongs to its Linear alone; {name} is shared with another "
            "module or part of a fused one: leave it out of target_modules, or keep the adapter beside the model"
        )
    return stored


def write_description(source: Checkpoint, staged: Path) -> None:
    """Everything but the tensors: config.json of a dense checkpoint, and the files beside it."""
    copy_description(source.directory, staged)
    settings = read_json(source.directory / "config.json")
    for key in ("quantization_config", "torch_dtype"):
        settings.pop(key, None)
    settings["dtype"] = str(source.dtype).removeprefix("torch.")
    state_ties(source.hf_config, settings)
    atomic_write_text(staged / "config.json", json.dumps(settings, indent=2) + "\n")
