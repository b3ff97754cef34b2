"""Everything about a run that is known before a weight is read: modules, schemes, format, sizes, conflicts."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ptq.budget import check_budget
from ptq.config import DEVICE, BitBudget, RunConfig, check_method, matches, scheme_for, unused_patterns
from ptq.errors import ConfigError
from ptq.formats import CODECS
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import Codec, Scheme
from ptq.formats.staging import resolved
from ptq.models.classes import predicts_text, require_prediction, require_text_alone
from ptq.models.experts import experts_of, routers
from ptq.models.hub import HubHeaders, holds_weights
from ptq.models.loading import (
    build_skeleton,
    check_floating,
    check_shape,
    load_module,
    locate,
    model_dtype,
    read_config,
    unload_module,
)
from ptq.models.names import SourceNames, unplaced
from ptq.models.streamed import StreamedModel
from ptq.models.structure import find_blocks, linears, output_head, weight_shape
from ptq.packed import require_described, require_multiplied


class Plan(NamedTuple):
    """A run, resolved and checked."""

    config: RunConfig
    directory: Path  # of the parent model
    hf_config: Any
    skeleton: nn.Module  # parameters on meta
    blocks: str  # path of the ModuleList
    schemes: dict[str, Scheme | None]  # every Linear of the model; None stays in float
    shapes: dict[str, tuple[int, int]]  # (N, K) of every Linear
    codec: Codec
    reader: CheckpointReader | HubHeaders
    names: SourceNames
    dtype: torch.dtype
    device: torch.device

    @property
    def targets(self) -> dict[str, Scheme]:
        """The Linears to be quantized."""
        return {path: scheme for path, scheme in self.schemes.items() if scheme is not None}


def make_plan(config: RunConfig, *, weights: bool = True) -> Plan:
    """Resolve a configuration against the model's files.

    Without ``weights`` a hub model's shards are not fetched: the plan can be described but not carried out.

    Raises:
        ConfigError: model or device not there, a pattern without a module, a scheme the format or a shape rules out.
        FormatError: a damaged checkpoint.
        UnsupportedModelError: no decoder blocks found.
    """
    device = resolve_device(config.device)
    check_method(config)
    check_output(config)
    directory = locate(config.model, config.revision, weights=weights)
    hf_config = read_config(directory, trust_remote_code=config.trust_remote_code)
    if getattr(hf_config, "quantization_config", None):
        raise ConfigError(f"model must be a float checkpoint; {directory} is quantized already: name its parent")
    dtype = model_dtype(hf_config, config.dtype)
    require_multiplied(dtype)  # by whoever loads the result
    _check_no_adapter(directory)
    skeleton = build_skeleton(hf_config, dtype, trust_remote_code=config.trust_remote_code)
    require_text_alone(skeleton)
    for key, asked in _predicting(config).items():
        if asked:
            require_prediction(skeleton, key)
    blocks = find_blocks(skeleton)
    found = dict(linears(skeleton))
    schemes = {path: scheme_for(config, path) for path in found}
    if "lm_head" in config.exclude:  # means the head, whatever the architecture calls it
        schemes |= dict.fromkeys(_heads(skeleton, found))
    never = _never_quantized(skeleton, blocks, found)
    schemes |= dict.fromkeys(never)
    shapes = {path: weight_shape(module) for path, module in found.items()}
    _check_patterns(config, list(found))
    _check_reach(config, schemes, blocks, never)
    codec = CODECS[config.format]
    check_budget(config, schemes, shapes)
    codec.check(schemes, shapes)
    on_hub = not Path(config.model).expanduser().is_dir()
    elsewhere = on_hub and not weights and not holds_weights(directory)
    reader = HubHeaders(config.model, config.revision) if elsewhere else CheckpointReader(directory)
    require_described(directory, reader.names())
    names = SourceNames(skeleton, reader.names())
    _check_stored(skeleton, reader, names)
    _check_head(skeleton, names, schemes)
    _check_length(config, hf_config)
    return Plan(config, directory, hf_config, skeleton, blocks, schemes, shapes, codec, reader, names, dtype, device)


def _predicting(config: RunConfig) -> dict[str, bool]:
    """What is measured on logits of the next token, and whether a run is to do it."""
    return {
        "evaluation": config.evaluation is not None,
        "a bit budget": isinstance(config.bits, BitBudget),
        "refine.model_steps": config.refine.model_steps > 0,
        "gptq.gradient_tokens": config.gptq.gradient_tokens > 0,
    }


def _check_no_adapter(directory: Path) -> None:
    """transformers loads an adapter that lies beside the weights, onto them or onto a model that it names itself."""
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise ConfigError(
            f"model must be one without an adapter; {directory} holds {adapter.name}, so transformers loads another "
            "model than its weights are: move the adapter to a directory of its own, then merge the two with "
            "`ptq merge`, or quantize the weights alone"
        )


def _heads(skeleton: nn.Module, found: Mapping[str, nn.Module]) -> list[str]:
    """Path of the Linear that puts out the logits."""
    head = output_head(skeleton)
    return [path for path, module in found.items() if module is head]


def _never_quantized(skeleton: nn.Module, blocks: str, found: Mapping[str, nn.Module]) -> list[str]:
    """Linears that stay in float whatever a configuration says: routers, and what is neither in a block nor a head."""
    beside, heads = routers(skeleton), _heads(skeleton, found)
    top = predicts_text(skeleton)  # then a Linear that stands beside the model alone is its head
    outside = [p for p in found if not p.startswith(f"{blocks}.") and not (top and "." not in p) and p not in heads]
    return [*outside, *(path for path in found if path in beside)]


def resolve_device(name: str | torch.device) -> torch.device:
    """The device to run on; ``auto`` is CUDA where there is one. A torch.device is checked if it is one of CUDA.

    Raises:
        ConfigError: it is none of auto, cpu, cuda and cuda:N, or CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, torch.device) and not (isinstance(name, str) and DEVICE.fullmatch(name)):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; found {name!r}")
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device {name} must exist; this machine has {count} CUDA devices: use device: cpu or auto")
    return device


def check_output(config: RunConfig) -> None:
    """Refuse an output that would replace the model or lie among its files.

    Raises:
        ConfigError: output and model are the same directory, or one is inside the other.
    """
    model, output = resolved(Path(config.model), "`model`"), resolved(Path(config.output))
    if model.is_dir() and (model in (output, *output.parents) or output in model.parents):
        raise ConfigError(
            f"output must be a directory apart from the model's; {config.output} and {config.model} are the same or "
            "one is inside the other: choose another `output`"
        )


def _check_stored(skeleton: nn.Module, reader: CheckpointReader | HubHeaders, names: SourceNames) -> None:
    """The checkpoint must have every parameter, in the model's shape and as floats."""
    for name, parameter in skeleton.named_parameters():
        names.require(name)
        stored = names.find(name)
        if stored is not None:
            stored_as, shape = reader.spec(stored)
            check_shape(stored, parameter.shape, shape)
            check_floating(stored, parameter.dtype, stored_as)


def _check_head(skeleton: nn.Module, names: SourceNames, schemes: dict[str, Scheme | None]) -> None:
    """A packed head stands beside the embedding it was tied to, so the embedding needs a name of its own."""
    for path, scheme in schemes.items():
        weight = f"{path}.weight"
        if scheme is not None and names.is_tied(weight) and names.of_parameter(weight).endswith(weight):
            raise ConfigError(
                f"{path} can be quantized only where the checkpoint keeps the embedding it is tied to under its own "
                f"name; this one has {names.of_parameter(weight)} alone: add {path} to `exclude`"
            )


def _check_patterns(config: RunConfig, modules: list[str]) -> None:
    if "lm_head" in config.exclude and "lm_head" in config.overrides:
        raise ConfigError("overrides of lm_head have no effect while `exclude` has it: take lm_head out of `exclude`")
    unused = [p for p in unused_patterns(config, modules) if p != "lm_head"]
    if unused and any(matches(unused[0], module) for module in modules):
        raise ConfigError(f"overrides of {unused[0]!r} have no effect: `exclude` has every Linear that it matches")
    if unused and _is_expression(unused[0]):
        raise ConfigError(
            f"a pattern in exclude or overrides must match a Linear; {unused[0]!r} matches none. Patterns are no "
            "regular expressions: write names as they stand in the path (mlp, mlp.down_proj), or a whole path as a "
            "shell matches file names (*.mlp.*)"
        )
    if unused:
        names = dict.fromkeys([*modules, *(m.rpartition(".")[2] for m in modules)])  # many end alike
        near = get_close_matches(unused[0], names, n=2, cutoff=0.3)
        raise ConfigError(
            f"a pattern in exclude or overrides must match a Linear; {unused[0]!r} matches none"
            + (f": did you mean {' or '.join(near)}?" if near else "")
        )


def _is_expression(pattern: str) -> bool:
    """Whether it looks like a regular expression: llm-compressor marks them with "re:"."""
    return pattern.startswith(("re:", ".*", "^")) or any(sign in pattern for sign in "\\$(|+")


def _check_reach(config: RunConfig, schemes: Mapping[str, Scheme | None], blocks: str, never: Sequence[str]) -> None:
    if not any(schemes.values()):
        raise ConfigError(
            f"at least one Linear must be quantized; exclude rules out all {len(schemes)}: shorten `exclude`"
        )
    idle = set(unused_patterns(config, [path for path in schemes if path not in never])) & set(config.overrides)
    stray = [path for path in never for pattern in idle if matches(pattern, path)]
    if stray:
        raise ConfigError(
            f"only Linears of the decoder blocks ({blocks}) and the head can be quantized, and no routers; {stray[0]} "
            "is none of these: take it out of `overrides`"
        )


def _check_length(config: RunConfig, hf_config: Any) -> None:
    if config.calibrates:
        check_context(hf_config, "calibration.sequence_length", config.calibration.sequence_length)
    if config.evaluation is not None:
        check_context(hf_config, "evaluation.window", config.evaluation.window)


def check_context(hf_config: Any, key: str, length: int) -> None:
    """Refuse text that a model does not see at once: absent positions, or positions it was not trained for.

    Raises:
        ConfigError: ``length``, which ``key`` sets, is above the context that the model's configuration names.
    """
    settings = hf_config.get_text_config()
    limits = [getattr(settings, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # the latter: MPT
    for limit in limits:
        if isinstance(limit, int) and length > limit:
            raise ConfigError(f"{key} must be at most the model's context of {limit} tokens; found {length}: lower it")


def replaced_tensors(plan: Plan) -> set[str]:
    """Tensors of the parent that the result holds packed instead; the embedding of a tied head is not one of them."""
    replaced = {f"{plan.names.of_module(path)}.weight" for path in plan.targets}
    tied = {f"{path}.weight" for path in plan.targets if plan.names.is_tied(f"{path}.weight")}
    parts = [f"{path}.weight" for path in plan.targets if f"{path}.weight" not in tied]
    for path in taken_apart(plan):
        parts += [f"{path}.{name}" for name, _ in plan.skeleton.get_submodule(path).named_parameters()]
    for name in parts:
        if plan.names.find(name) is None:  # cut out of a fused tensor, or put together from several
            replaced.update(plan.names.sources(name))
    return replaced


def taken_apart(plan: Plan) -> list[str]:
    """Experts modules that the result holds expert by expert, because some of their Linears are packed."""
    return [path for path in experts_of(plan.skeleton) if any(name.startswith(f"{path}.") for name in plan.targets)]


def extra_tensors(plan: Plan) -> list[str]:
    """Tensors of the parent that its model has no place for; a result holds them as they are, for other programs."""
    return unplaced(plan.skeleton, plan.names, plan.reader.names())


def describe_extra(names: Sequence[str]) -> str:
    """What becomes of them, in a line."""
    shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    return f"tensors of the parent that its model has no place for are copied as they are: {shown}"


def block_count(plan: Plan) -> int:
    """Blocks of the model."""
    return len(plan.skeleton.get_submodule(plan.blocks)._modules)


def head_targets(plan: Plan) -> dict[str, Scheme]:
    """The Linears to be quantized that are not in the blocks."""
    return {name: scheme for name, scheme in plan.targets.items() if not name.startswith(plan.blocks + ".")}


def parent_stream(plan: Plan) -> StreamedModel:
    """The parent model, block by block."""

    def load(model: nn.Module, path: str) -> None:
        load_module(
            model, path, plan.reader, plan.names, device=plan.device, dtype=plan.dtype,
            skip=lambda name: not path and name.startswith(f"{plan.blocks}."),
        )  # fmt: skip

    return StreamedModel(plan.skeleton, plan.blocks, load, unload_module, plan.device)
