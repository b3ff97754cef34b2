"""``ptq lint``: whether a checkpoint's files are sound, where it loads, and over how many GPUs it can be split."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ptq.errors import ConfigError, FormatError
from ptq.formats import codec_for_config, readable_config, schemes_by_module
from ptq.formats.checkpoint import CheckpointReader, read_json
from ptq.formats.checks import FLOATS
from ptq.formats.codec import Codec, Config, Scheme
from ptq.lint_values import float_values, packed_values
from ptq.models.loading import build_skeleton, model_dtype, read_config
from ptq.models.names import SourceNames, unplaced
from ptq.models.stock import initialization_error, left_out
from ptq.models.structure import is_transposed, linears, output_head, weight_shape
from ptq.packed import require_described
from ptq.readers import REFUSES, Facts, Verdict, verdicts
from ptq.tensor_parallel import split_problems, unknown_roles

PARTS = (2, 4, 8)  # GPUs of a tensor-parallel group
_SHOWN = 3  # of many alike
# Files with a second copy of settings, of GPTQ and of AutoAWQ: how a setting is called there and in config.json.
_TWICE = {
    "quantize_config.json": {
        key: key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic")
    },
    "quant_config.json": {"w_bit": "bits", "q_group_size": "group_size", "zero_point": "zero_point"},
}
_EXPERT = re.compile(r"\.experts\.\*\.(gate_proj|up_proj|down_proj)$")


class Lint(NamedTuple):
    """What was found; nothing is wrong with a checkpoint without `problems`."""

    directory: Path
    problems: list[str]
    notes: list[str]
    readers: list[Verdict]
    parallel: dict[int, list[str]]  # for each number of GPUs, why the checkpoint cannot be split so

    @property
    def failure(self) -> str | None:
        """Why the checkpoint should not be given to others, None where it may be."""
        if self.problems:
            return f"{self.directory} is damaged: {_some(self.problems)}"
        if all(verdict.status == REFUSES for verdict in self.readers):
            reasons = "; ".join(f"{verdict.reader}: {verdict.reason}" for verdict in self.readers)
            return f"{self.directory} loads in none of transformers, vLLM and SGLang ({reasons})"
        return None


def lint(path: str | Path, *, trust_remote_code: bool = False) -> Lint:
    """Check a quantized checkpoint directory. Everything but the codes is read.

    Raises:
        ConfigError: no checkpoint directory, or not a quantized one.
        FormatError: the shards are damaged, truncated or incomplete.
        UnsupportedModelError: transformers does not know the model.
    """
    directory = Path(path).expanduser()
    if not (directory / "config.json").is_file():
        raise ConfigError(f"a checkpoint must be a directory with config.json; there is none at {directory}")
    hf_config = read_config(directory, trust_remote_code=trust_remote_code)
    settings = read_json(directory / "config.json").get("quantization_config")
    if not isinstance(settings, dict):
        if any(directory.glob("*.safetensors")):
            require_described(directory, CheckpointReader(directory).names())
        raise ConfigError(
            f"only quantized checkpoints are checked; {directory / 'config.json'} has no quantization_config"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        del hf_config.quantization_config  # the float model is built
    reader = CheckpointReader(directory)
    dtype = model_dtype(hf_config, "auto")
    model = build_skeleton(hf_config, dtype, trust_remote_code=trust_remote_code)
    names = SourceNames(model, reader.names())
    found = dict(linears(model))
    try:
        known = readable_config(settings)
        codec = codec_for_config(known)
        schemes = _schemes(codec, known, names, found, set(reader.names()))
    except FormatError as error:
        return Lint(directory, [f"quantization_config cannot be honoured: {error}"], [], [], {})
    if not schemes:
        return Lint(directory, ["quantization_config packs no Linear that this model has"], [], [], {})
    problems, notes = _tensors(model, codec, schemes, names, reader)
    problems += _second_copy(directory, settings)
    permuted: frozenset[str] = frozenset()
    if not problems:
        problems, permuted = packed_values(codec, schemes, names, reader)
        problems += float_values(model, schemes, names, reader)
    if problems:  # where it would load if it were sound is of no use
        return Lint(directory, problems, notes, [], {})
    shapes = {name: weight_shape(found[name]) for name in schemes}
    head = output_head(model)
    floats = tuple(name for name, module in found.items() if name not in schemes and module is not head)
    facts = Facts(
        codec.name, known, schemes, shapes, floats, permuted, _roles(model, schemes), _heads(hf_config),
        transposed=any(is_transposed(found[name]) for name in schemes),
        left_out=left_out(model, names, schemes), init_error=initialization_error(model, schemes),
        spelled={name: names.of_module(name) for name in found},
    )  # fmt: skip
    if settings.get("quant_method") != known.get("quant_method"):
        notes.append(
            f"quant_method is {settings.get('quant_method')!r}, for which readers have code of its own: what follows "
            f"holds once config.json says {known.get('quant_method')!r}"
        )
    roleless = unknown_roles(facts)
    if roleless:
        notes.append(f"how engines split {_some(roleless)} is not said by the model's class: not checked")
    parallel = {} if len(roleless) == len(schemes) else {parts: split_problems(facts, parts) for parts in PARTS}
    return Lint(directory, problems, notes, verdicts(facts), parallel)


def describe(result: Lint) -> str:
    """The result as text: what is wrong, a line for each reader, a line for each number of GPUs."""
    lines = [f"checkpoint    {result.directory}"]
    lines += [f"damaged       {problem}" for problem in result.problems] or ["files         sound"]
    lines += [f"note          {note}" for note in result.notes]
    if result.readers:
        lines.append("")
        lines += [f"{v.reader:14}{v.status}{': ' if v.reason else ''}{v.reason}" for v in result.readers]
        lines.append("")
    for parts, problems in result.parallel.items():
        said = f"no: {_some(problems)}" if problems else "yes"
        lines.append(f"{parts} GPUs        {said}")
    return "\n".join(lines)


def _some(items: Iterable[str]) -> str:
    """The first of many, and how many more there are."""
    listed = list(items)
    more = f" (and {len(listed) - _SHOWN} more)" if len(listed) > _SHOWN else ""
    return "; ".join(listed[:_SHOWN]) + more


def _schemes(
    codec: Codec, settings: Config, names: SourceNames, found: Mapping[str, nn.Module], stored: set[str]
) -> dict[str, Scheme]:
    """Schemes of packed Linears."""
    spelled = {name: names.of_module(name) for name in found}
    schemes = schemes_by_module(codec, settings, spelled)
    # Where there is a weight and nothing packed, the Linear was left in float.
    return {
        name: scheme
        for name, scheme in schemes.items()
        if f"{spelled[name]}.weight" not in stored
        or any(tensor in stored for tensor in codec.tensor_names(spelled[name], scheme))
    }


def _tensors(
    model: nn.Module, codec: Codec, schemes: Mapping[str, Scheme], names: SourceNames, reader: CheckpointReader
) -> tuple[list[str], list[str]]:
    """Missing and extra tensors, wrong dtypes and shapes; and what is odd but harmless."""
    problems: list[str] = []
    used: set[str] = set()
    stored = set(reader.names())
    for name, scheme in schemes.items():
        used |= _packed_tensors(problems, codec, names.of_module(name), weight_shape(model.get_submodule(name)), scheme,
                                reader)  # fmt: skip
    packed_weights = {f"{name}.weight" for name in schemes}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in packed_weights:
            continue
        sources = names.sources(name)
        if not sources:
            problems.append(f"{name} is missing")
        elif names.find(name) is not None:
            _compare(problems, reader, sources[0], FLOATS, tuple(parameter.shape))
    notes: list[str] = []
    packed = _packed_leaves(codec, schemes)
    for tensor in unplaced(model, names, stored - used):
        module, _, leaf = tensor.rpartition(".")
        if leaf in packed:  # of a weight that no configuration describes
            problems.append(f"{tensor} is extra: the model has no packed Linear there")
        elif leaf == "bias" and any(names.of_module(name) == module for name in schemes):
            notes.append(f"{tensor} is a bias that the model has no place for; readers leave it out")
        else:  # parents come with such tensors, and a run copies them
            notes.append(f"{tensor} is extra: the model has no place for it; transformers leaves it out")
    return problems, notes


def _packed_leaves(codec: Codec, schemes: Mapping[str, Scheme]) -> set[str]:
    """How names of packed tensors end."""
    asymmetric = next(iter(schemes.values()))._replace(symmetric=False)
    return {name.rpartition(".")[2] for name in codec.tensor_names("", asymmetric)}


def _packed_tensors(
    problems: list[str], codec: Codec, spelled: str, shape: tuple[int, int], scheme: Scheme, reader: CheckpointReader
) -> set[str]:
    """Compare the tensors of one packed Linear ``(N, K)`` with what its scheme asks for; which of them there are."""
    n, k = shape
    stored = set(reader.names())
    present = stored.intersection(codec.tensor_names(spelled, scheme))
    if k % scheme.columns(k):
        problems.append(f"{spelled}: groups of {scheme.group_size} do not divide its {k} columns")
        return present
    order = codec.order_name(spelled)
    for tensor, (dtype, expected) in codec.tensor_specs(spelled, n, k, scheme, torch.float16).items():
        if tensor in stored:
            dtypes: tuple[torch.dtype, ...] = FLOATS if dtype == torch.float16 else (dtype,)
            if tensor.endswith(("g_idx", "weight_shape")):
                dtypes = (torch.int32, torch.int64)
            _compare(problems, reader, tensor, dtypes, expected)
            if tensor.endswith("weight_shape") and reader.spec(tensor)[1] == expected:
                stated = reader.tensor(tensor).tolist()
                if stated != [n, k]:
                    problems.append(f"{tensor} must say {[n, k]}, the shape of the weight in the model, found {stated}")
        elif tensor != order:
            problems.append(f"{tensor} is missing")
    if f"{spelled}.weight" in stored:
        problems.append(f"{spelled} must be packed or in float: the file holds {spelled}.weight as well")
        present.add(f"{spelled}.weight")
    return present


def _compare(
    problems: list[str], reader: CheckpointReader, tensor: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    dtype, found = reader.spec(tensor)
    if dtype not in dtypes:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        problems.append(f"{tensor} must be {wanted}, found {str(dtype).removeprefix('torch.')}")
    if found != shape:
        problems.append(f"{tensor} must have shape {list(shape)}, found {list(found)}")


def _second_copy(directory: Path, settings: Config) -> list[str]:
    """Some readers take the settings from a file of their own: two that differ are two models."""
    problems = []
    for file, keys in _TWICE.items():
        copy = read_json(directory / file) if (directory / file).is_file() else {}
        problems += [
            f"{key} is {settings[key]!r} in config.json and {copy[other]!r} in {file}: some readers take one, some the "
            "other"
            for other, key in keys.items()
            if other in copy and key in settings and copy[other] != settings[key]
        ]
    if settings.get("quant_method") != "modelopt" and (directory / "hf_quant_config.json").is_file():
        problems.append(
            f"quant_method is {settings.get('quant_method')!r} in config.json, and hf_quant_config.json is another "
            "tool's (ModelOpt): some readers take one, some the other"
        )
    return problems


def _roles(model: nn.Module, schemes: Iterable[str]) -> dict[str, str]:
    """How engines split each Linear, where the model's own tensor-parallel plan says so; nothing is guessed."""
    config: Any = model.config
    text = config.get_text_config()
    plan = {**(getattr(config, "base_model_tp_plan", None) or {}), **(getattr(text, "base_model_tp_plan", None) or {})}
    roles = {}
    for name in schemes:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        # Experts have their own entries there, under the names of the stacked parameters.
        merged = _EXPERT.sub(lambda m: f".experts.{'down' if m[1] == 'down_proj' else 'gate_up'}_proj", pattern)
        kind = next((plan[key] for key in plan if f".{merged}".endswith(f".{key}")), "")
        role = "row" if "row" in kind else "column" if "col" in kind else None
        if role is not None:
            roles[name] = role
    return roles


def _heads(config: Any) -> tuple[int, int]:
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None) or 0
    return queries, getattr(text, "num_key_value_heads", None) or queries
