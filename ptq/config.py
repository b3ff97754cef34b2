"""One run, described by one YAML file: a frozen tree of dataclasses without inference.

``load_config`` reads and checks it, ``dump`` writes it back in full. A relative path in a configuration counts from
the working directory. For the configurations shipped in ``configs/``, a model directory or data file that is not found
there is looked for below the repository's root, so that ``--config demo.yaml`` works from any directory; ``output``
always counts from the working directory.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ptq.config_paths import config_text, counted, find_directory, find_files, search_roots, with_variables
from ptq.errors import ConfigError
from ptq.formats.codec import WIDTHS, Scheme
from ptq.schema import at_least, build, check_rules, checked
from ptq.yaml_tree import override, parse, plain, unparse

_BITS = checked(lambda bits: bits in WIDTHS, "2, 3, 4 or 8")
_BITS_OR_BUDGET = checked(
    lambda bits: isinstance(bits, BitBudget) or bits in WIDTHS, "2, 3, 4 or 8, or {budget: average}"
)
_GROUP = checked(lambda size: size == -1 or size >= 1, "-1 (one group per channel) or 1 or more columns")
DEVICE = re.compile(r"auto|cpu|cuda(:([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?")  # beyond, torch starts again at 0
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"([1-9][0-9]*)(KB|MB|GB|TB)")


@dataclass(frozen=True)
class BitBudget:
    """Bits to spend instead of one width for all: every group of Linears gets its own (see docs/compare.md).

    ``budget``: bits a quantized weight takes on average, without scales and zeros; never exceeded.
    """

    budget: float = field(metadata=checked(lambda bits: 2 <= bits <= 8, "between 2 and 8"))


@dataclass(frozen=True)
class SchemeOverride:
    """What differs for the modules of one pattern; null, or a key left out, keeps the value of the run.

    ``bits``, ``group_size``, ``symmetric``: as in :class:`RunConfig`.
    """

    bits: int | None = field(default=None, metadata=_BITS)
    group_size: int | None = field(default=None, metadata=_GROUP)
    symmetric: bool | None = None


@dataclass(frozen=True)
class DatasetConfig:
    """Where text comes from: either ``name``, a dataset on the Hugging Face hub, or ``files`` on this machine.

    ``name``, ``config``, ``split``: of the hub dataset, as ``datasets.load_dataset`` takes them.
    ``streaming``: read the hub dataset as it is needed instead of downloading all of it first.
    ``files``: paths ending in ``.txt`` (one document a file), ``.jsonl``, ``.json`` or ``.parquet`` (one document a
    row); all but ``.parquet`` may have ``.gz`` after it. ``column``: of the rows that holds the text.
    """

    name: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = True
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that shows the solvers which activations occur.

    ``dataset``: see :class:`DatasetConfig`; ``samples``: sequences drawn; ``sequence_length``: tokens of each;
    ``batch_size``: sequences run through a block at a time (speed and memory only, and a step of ``refine``);
    ``seed``: of the drawing;
    ``chat_template``: true when the column holds lists of messages or prompts: one sample a row, rendered with the
    tokenizer's chat template, at most ``sequence_length`` tokens of it;
    ``offload``: where the hidden states of all samples are between two blocks, in ``memory`` or on the ``disk`` beside
    the output (less memory, the same result).
    """

    dataset: DatasetConfig = DatasetConfig(name="allenai/c4", config="en")
    samples: int = field(default=128, metadata=at_least(1))
    sequence_length: int = field(default=2048, metadata=at_least(2))
    batch_size: int = field(default=8, metadata=at_least(1))
    seed: int = field(default=0, metadata=checked(lambda seed: 0 <= seed < 2**63, "between 0 and 2**63 - 1"))
    chat_template: bool = False
    offload: Literal["memory", "disk"] = "memory"


@dataclass(frozen=True)
class GPTQConfig:
    """Options of the GPTQ solver.

    ``damping``: fraction of the mean diagonal of H that is added to the diagonal;
    ``activation_order``: ``static`` quantizes columns by decreasing diagonal of H on grids fixed beforehand, ``none``
    takes them from left to right; ``block_size``: columns between two updates of the remaining weight (speed only);
    ``scales``: ``hessian`` searches those that lose least where inputs are strong, ``range`` spans each group's range;
    ``candidates``: multiples of those scales that are solved for, each row keeping its best (1: the scales themselves);
    ``sweeps``: rounds of coordinate descent over the finished codes; ``correct_inputs``: share, 0 to 1, of the
    correction for what the quantized layers before changed (0 also saves a second pass of hidden states);
    ``gradient_tokens``: tokens of which gradients say how errors of a Linear's outputs meet again at the model's end,
    so that its rows make up for each other's (0: each row by itself); of language models, method ``gptq`` only.
    """

    damping: float = field(default=0.01, metadata=checked(lambda damping: 0 < damping <= 1, "above 0, at most 1"))
    activation_order: Literal["static", "none"] = "static"
    block_size: int = field(default=128, metadata=at_least(1))
    scales: Literal["hessian", "range"] = "hessian"
    candidates: int = field(default=7, metadata=at_least(1))
    sweeps: int = field(default=1, metadata=at_least(0))
    correct_inputs: float = field(default=0.5, metadata=checked(lambda share: 0 <= share <= 1, "between 0 and 1"))
    gradient_tokens: int = field(default=0, metadata=at_least(0))


@dataclass(frozen=True)
class AWQConfig:
    """Options of the AWQ search.

    ``grid``: exponents between 0 and 1 that are tried for the channel scales; ``clip``: search weight ranges as well;
    ``codes``: ``round`` rounds the scaled weights to nearest, ``gptq`` solves for them as the ``gptq`` options say.
    """

    grid: int = field(default=20, metadata=at_least(1))
    clip: bool = True
    codes: Literal["round", "gptq"] = "round"


@dataclass(frozen=True)
class RefineConfig:
    """Options of the refinement of finished codes, whatever the method.

    ``steps``: gradient steps a block, each on one calibration batch, towards the float block's output; 0: no
    refinement. ``model_steps``: steps on the whole model once all blocks are finished, towards the parent's
    predictions; the model, its parent and an optimizer's state must fit into memory together.
    """

    steps: int = field(default=0, metadata=at_least(0))
    model_steps: int = field(default=0, metadata=at_least(0))


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out text on which the model is compared before and after.

    ``files`` or ``dataset``: the text, one of the two (files as in :class:`DatasetConfig`);
    ``tokens``: tokens read at most, shared evenly by the files; ``window``: tokens the model sees at once;
    ``stride``: tokens from one window to the next; below ``window``, the overlap is context and is not scored twice.
    """

    files: tuple[str, ...] = ()
    dataset: DatasetConfig | None = None
    tokens: int = field(default=16384, metadata=at_least(2))
    window: int = field(default=512, metadata=at_least(2))
    stride: int = field(default=512, metadata=at_least(1))

    @property
    def source(self) -> DatasetConfig:
        """The text as a dataset, whichever way it was given."""
        return self.dataset if self.dataset is not None else DatasetConfig(files=self.files)


@dataclass(frozen=True)
class RunConfig:
    """One quantization run.

    ``model``: hub name or directory; ``revision``: branch, tag or commit on the hub; ``output``: directory written;
    ``method``: ``gptq``, ``awq`` or ``rtn``; ``bits``: 2, 3, 4 or 8, or a :class:`BitBudget`;
    ``group_size``: columns that share a scale, -1 for one group per channel;
    ``symmetric``: the zero point is the middle code everywhere;
    ``format``: ``gptq``, ``gptq_v2``, ``awq`` or ``compressed-tensors``;
    ``exclude``: module path patterns that stay as they are, ``lm_head`` meaning the output head whatever its name;
    ``overrides``: module path pattern to
    :class:`SchemeOverride`, later entries win (for patterns see :func:`matches`);
    ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``dtype``: of the model while it runs and of
        what it keeps in float, in the checkpoint too, ``auto`` as config.json says, float32 where it does not;
    ``trust_remote_code``: run Python code that comes with the model; ``max_shard_size``: of a checkpoint file, as in
    ``5GB`` (powers of ten); ``strict``: numerical rescues become errors;
    ``calibration``, ``gptq``, ``awq``, ``refine``, ``evaluation``: see their classes; ``evaluation: null``
    evaluates nothing.
    """

    model: str
    output: str
    method: Literal["gptq", "awq", "rtn"]
    revision: str | None = None
    bits: int | BitBudget = field(default=4, metadata=_BITS_OR_BUDGET)
    group_size: int = field(default=128, metadata=_GROUP)
    symmetric: bool = True
    format: Literal["gptq", "gptq_v2", "awq", "compressed-tensors"] = "gptq"
    exclude: tuple[str, ...] = ("lm_head",)
    overrides: Mapping[str, SchemeOverride] = field(default_factory=dict)
    device: str = field(
        default="auto",
        metadata=checked(lambda device: DEVICE.fullmatch(device) is not None, "auto, cpu, cuda or cuda:N (as cuda:1)"),
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
    max_shard_size: str = field(
        default="5GB",
        metadata=checked(lambda size: _SIZE.fullmatch(size) is not None, "a size such as 5GB, 500MB or 800KB"),
    )
    strict: bool = False
    calibration: CalibrationConfig = CalibrationConfig()
    gptq: GPTQConfig = GPTQConfig()
    awq: AWQConfig = AWQConfig()
    refine: RefineConfig = RefineConfig()
    evaluation: EvaluationConfig | None = None

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is needed."""
        return self.solves_with_text or self.refine.model_steps > 0 or isinstance(self.bits, BitBudget)

    @property
    def solves_with_text(self) -> bool:
        """Whether blocks are run on calibration text while they are quantized."""
        return self.method != "rtn" or self.refine.steps > 0

    @property
    def solves_for_codes(self) -> bool:
        """Whether codes are GPTQ's, be it on weights that AWQ has scaled."""
        return self.method == "gptq" or (self.method == "awq" and self.awq.codes == "gptq")

    @property
    def follows_float(self) -> bool:
        """Whether the float model's hidden states are followed beside the quantized ones."""
        return self.refine.steps > 0 or (self.solves_for_codes and self.gptq.correct_inputs > 0)

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        return int(self.max_shard_size[:-2]) * _UNITS[self.max_shard_size[-2:]]


def load_config(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of the YAML file ``path`` (found as by :func:`resolve_config_path`).

    A mapping with the same keys may stand in for a file, and is checked as one.
    ``overrides`` are ``key=value`` with dotted keys and YAML values, as in ``calibration.samples=64``,
    ``overrides.model.layers.0.bits=8`` or ``evaluation=null``; later ones win. Raises ConfigError.
    """
    if isinstance(path, Mapping):
        return _checked(plain(path, "the configuration"), overrides, [Path()])
    return configured(*config_text(path), overrides)


def configured(file: Path, text: str, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, of a file that was read: a pipe gives its text once."""
    tree = parse(text, str(file))
    if tree is None:
        raise ConfigError(f"{file} is empty; it needs at least the keys model, output and method")
    return _checked(tree, overrides, search_roots(file))


def _checked(tree: Any, overrides: Sequence[str], roots: Sequence[Path]) -> RunConfig:
    if isinstance(tree, dict):
        for assignment in overrides:
            override(tree, assignment)
    config = build(RunConfig, tree)
    _check_source(config.calibration.dataset, "calibration.dataset")
    check_method(config)
    if config.evaluation is not None:
        check_evaluation(config.evaluation)
    return _locate(config, roots)


def dump(config: RunConfig) -> str:
    """YAML of every key, which loads to an equal configuration."""
    tree = asdict(config)
    tree["overrides"] = {
        pattern: {key: value for key, value in scheme.items() if value is not None}
        for pattern, scheme in tree["overrides"].items()
    }
    return unparse(tree)


def matches(pattern: str, module_name: str) -> bool:
    """Whether a module path pattern means the module (or one above it) of the dotted path ``module_name``.

    A plain pattern matches where its segments stand next to each other in the path: ``lm_head``,
    ``mlp.down_proj`` (in every block) and ``model.layers.0`` (everything below it). A pattern with ``*``, ``?`` or
    ``[...]`` must match the whole path, as file names are matched: ``model.layers.1?.*``, ``*.o_proj``.
    """
    if any(character in pattern for character in "*?["):
        return fnmatchcase(module_name, pattern)
    return f".{pattern}." in f".{module_name}."


def scheme_for(config: RunConfig, module_name: str) -> Scheme | None:
    """How the Linear at ``module_name`` is quantized; None when ``exclude`` names it, whatever ``overrides`` says."""
    if any(matches(pattern, module_name) for pattern in config.exclude):
        return None
    # Under a budget the widest that is not above it stands in until the widths are chosen.
    bits = config.bits if isinstance(config.bits, int) else max(b for b in WIDTHS if b <= config.bits.budget)
    scheme = Scheme(bits, config.group_size, config.symmetric)
    for pattern, change in config.overrides.items():
        if matches(pattern, module_name):
            scheme = scheme._replace(**{key: value for key, value in asdict(change).items() if value is not None})
    return scheme


def fixed_bits(config: RunConfig, module_name: str) -> int | None:
    """The width that ``overrides`` give the Linear at ``module_name``, which a budget leaves alone; None for none."""
    named = [o.bits for p, o in config.overrides.items() if o.bits is not None and matches(p, module_name)]
    return named[-1] if named else None


def unused_patterns(config: RunConfig, module_names: Iterable[str]) -> list[str]:
    """Patterns of ``exclude`` and ``overrides`` without effect on any of ``module_names``, in order.

    An override that matches excluded modules only has no effect.
    """
    names = list(module_names)
    kept = [name for name in names if scheme_for(config, name) is not None]
    unused = [pattern for pattern in config.exclude if not any(matches(pattern, name) for name in names)]
    return unused + [pattern for pattern in config.overrides if not any(matches(pattern, name) for name in kept)]


def _check_source(source: DatasetConfig, path: str) -> None:
    if (source.name is None) == (not source.files):
        found = "neither" if source.name is None else "both"
        raise ConfigError(
            f"{path} needs either name (a hub dataset) or files (local text), found {found}; "
            f"give one, as in {path}={{files: [text.txt]}}"
        )
    if source.files and (source.config is not None or source.split != "train"):
        raise ConfigError(f"{path}.config and {path}.split belong to a hub dataset, found them with files; remove them")


def check_method(config: RunConfig) -> None:
    """Raise ConfigError for an option that the method of the run has no use for and that costs much."""
    if config.gptq.gradient_tokens and config.method != "gptq":
        raise ConfigError(
            f"gptq.gradient_tokens must be 0 unless method is gptq; found {config.gptq.gradient_tokens} with "
            f"{config.method}: set it to 0, or method to gptq"
        )


def check_evaluation(evaluation: EvaluationConfig, prefix: str = "evaluation.") -> None:
    """Raises ConfigError for values out of range or at odds, also of an evaluation that was not read from YAML.

    ``prefix``: what stands before a name where the values came from; ``--`` on a command line.
    """
    check_rules(evaluation, prefix)
    if (evaluation.dataset is None) == (not evaluation.files):
        found = "neither" if evaluation.dataset is None else "both"
        raise ConfigError(
            f"evaluation needs either files or dataset, found {found}; give one, or set evaluation to null"
        )
    _check_source(evaluation.source, "evaluation.dataset")
    if evaluation.stride > evaluation.window:
        raise ConfigError(
            f"{prefix}stride must be at most {prefix}window ({evaluation.window}), found {evaluation.stride}; "
            "a larger stride would skip text"
        )
    files = max(1, len(evaluation.source.files))
    if evaluation.tokens < evaluation.window * files:
        raise ConfigError(
            f"{prefix}tokens must hold a window of {evaluation.window} for each of {files} file(s), that is "
            f"{evaluation.window * files} or more, found {evaluation.tokens}; raise it or shorten {prefix}window"
        )


def _locate(config: RunConfig, roots: Sequence[Path]) -> RunConfig:
    """``config`` with the model directory and the data files found below ``roots``, and no variables in paths."""
    named, output = with_variables(config.model, "model"), with_variables(config.output, "output")
    model = find_directory(named, roots)
    if model is None and named.startswith(("/", "./", "../", "~")):
        raise ConfigError(
            f"model must be a hub name or a directory that exists, found {named!r}; check it{counted((named,), roots)}"
        )
    dataset, evaluation = config.calibration.dataset, config.evaluation
    dataset = replace(dataset, files=find_files(dataset.files, "calibration.dataset.files", roots))
    if evaluation is not None:
        evaluation = replace(evaluation, files=find_files(evaluation.files, "evaluation.files", roots))
        if evaluation.dataset is not None:
            files = find_files(evaluation.dataset.files, "evaluation.dataset.files", roots)
            evaluation = replace(evaluation, dataset=replace(evaluation.dataset, files=files))
    calibration = replace(config.calibration, dataset=dataset)
    return replace(config, model=model or named, output=output, calibration=calibration, evaluation=evaluation)
