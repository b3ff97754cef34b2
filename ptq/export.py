"""A model as one GGUF file: a checkpoint's codes carried over, a float model's solved for the block formats."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ptq.config import RunConfig
from ptq.errors import ConfigError, NumericsError
from ptq.export_packed import dense_weight, misfit, packed_weight
from ptq.export_solve import Calibration, Job, calibration_for, follows_float, is_solved, solve_block, solve_head
from ptq.formats.checkpoint import CheckpointReader, read_json
from ptq.gguf.block import SolvedLinear
from ptq.gguf.blocks import KINDS, encode
from ptq.gguf.carry import carry
from ptq.gguf.file import PLAIN, GgufFile, gguf_file, refuse_existing
from ptq.gguf.layout import ROPE_FACTORS, Model, Target, describe_model, paired_rows, require_gguf, targets
from ptq.gguf.mix import FILE_TYPES, FLOAT, FileType, file_type
from ptq.gguf.rounding import raised_groups, round_blocks
from ptq.gguf.tokens import SPECIAL, tokenizer_keys, tokenizer_notes
from ptq.gguf.words import Value
from ptq.grid import check_finite
from ptq.half_products import fast_half_products
from ptq.models.classes import require_prediction
from ptq.models.loading import load_tokenizer, locate
from ptq.nn.linear import QuantLinear
from ptq.parent import recorded_parent, require_parent
from ptq.progress import Progress
from ptq.runtime import Checkpoint, open_checkpoint, open_stream
from ptq.version import VERSION

LARGEST_HALF = 65504.0


class Exported(NamedTuple):
    """What was written."""

    path: Path
    size: int  # bytes
    kinds: Mapping[str, int]  # tensors of each kind
    carried: int  # tensors whose codes are the checkpoint's
    deviation: float  # of carried values at most, as a share of a step (Q4_1 minimums are rounded to float16)
    loss: float | None  # mean loss of the solved tensors as a share of rounding's
    notes: tuple[str, ...]


@dataclass
class Tally:
    """What became of the tensors, as they are written."""

    losses: list[float] = field(default_factory=list)  # of solved ones, as shares of rounding's
    deviations: list[float] = field(default_factory=list)  # of carried ones, as shares of a step
    written_out: int = 0  # packed ones as the values of their codes
    raised: dict[str, int] = field(default_factory=dict)  # groups with weights too small for a scale, by parameter


def export_gguf(
    checkpoint: str,
    type_name: str,
    out: str | None = None,
    run: RunConfig | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as a GGUF file.

    Args:
        checkpoint: directory or hub name, float or quantized. If codes of a quantized one do not fit the type, the
            float model it was made from is solved instead, where its ptq_config.yaml names one and `run` is given. F16
            holds the values that its codes mean.
        type_name: key of `ptq.gguf.mix.FILE_TYPES`, in capitals or not.
        out: file, or directory to put ``NAME-TYPE.gguf`` in; default the working directory.
        run: text and options to solve with: its ``calibration``, ``gptq``, ``device``, ``dtype`` and ``strict``.
            Needed for a float model unless the type is F16; with a quantized one it covers the Linears left in float,
            which without it are F16, as are the embeddings.
        overwrite: replace an existing file.
        trust_remote_code: run Python code that comes with the model.
        progress: where to report to.

    Raises:
        ConfigError: unknown type, output in the way, missing package or text, codes that do not fit.
        UnsupportedModelError: a model, tokenizer or feature llama.cpp has no counterpart for.
        PtqError: files or numbers are not as required.
    """
    require_gguf()
    file, progress = file_type(type_name), progress or Progress()
    type_name = type_name.upper()  # as files of this type are called
    path = _output(out, checkpoint, type_name)
    refuse_existing(path, overwrite)
    dtype = "auto" if run is None else run.dtype
    source = open_checkpoint(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    require_prediction(source.model, "a GGUF file")
    model = describe_model(source.hf_config)
    rows = source.hf_config.vocab_size
    tokenizer = load_tokenizer(source.directory, trust_remote_code)
    keys: dict[str, Value] = {
        "general.type": "model",
        "general.name": _name(checkpoint),
        "general.file_type": file.number,
        "general.quantization_version": 2,
        "general.quantized_by": f"ptq {VERSION}",
        **model.keys,
        **tokenizer_keys(tokenizer, rows, _configured_ids(source, rows)),
    }
    found = _targets(source, model, file, keep_float=run is None)
    problem = misfit(source, found)
    if problem is not None:
        parent = _float_parent(source, problem, type_name, run)
        solved = export_gguf(parent, type_name, str(path), run, overwrite=overwrite,
                             trust_remote_code=trust_remote_code, progress=progress)  # fmt: skip
        return solved._replace(notes=(*solved.notes, f"solved from {parent}, because {problem}"))
    calibration = None
    if any(is_solved(source, target) for target in found):
        calibration = calibration_for(run, source, tokenizer, type_name)
    job = Job(source, model, found, calibration)
    tally = Tally()
    with (
        gguf_file(path, model.architecture, keys, found, overwrite=overwrite) as output,
        progress.stage("export", model.blocks),
        fast_half_products(calibration.device if calibration else torch.device("cpu")),
    ):
        _write(job, output, progress, tally)
    return Exported(
        path, path.stat().st_size, Counter(t.kind for t in found), len(tally.deviations),
        max(tally.deviations, default=0.0), sum(tally.losses) / len(tally.losses) if tally.losses else None,
        (*tokenizer_notes(tokenizer), *_notes(model, found, calibration), *_told(tally)),
    )  # fmt: skip


def show(exported: Exported) -> str:
    """The export as lines for a person."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(exported.kinds.items()))
    lines = [f"{exported.path}: {exported.size / 1e6:.1f} MB", f"tensors: {kinds}"]
    if exported.carried:
        off = f"no value off by more than {exported.deviation:.2g} of a step"
        values = off if exported.deviation else "every value exactly the checkpoint's"
        lines.append(f"{exported.carried} tensors carried over, every code unchanged, {values}")
    if exported.loss is not None:
        lines.append(f"solved with the Hessian: on average {exported.loss:.3f} of the loss of rounding")
    return "\n".join([*lines, *exported.notes])


def _configured_ids(source: Checkpoint, rows: int) -> dict[str, int]:
    """Special tokens by the model's configurations, which end its texts where the tokenizer names none."""
    path = source.directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    ids: dict[str, int] = {}
    for name in SPECIAL:
        for value in (generation.get(f"{name}_token_id"), getattr(source.hf_config, f"{name}_token_id", None)):
            index = value[0] if isinstance(value, list) and value else value  # the first of several
            if isinstance(index, int) and 0 <= index < rows:
                ids.setdefault(name, index)
    return ids


def _name(checkpoint: str) -> str:
    path = Path(checkpoint).expanduser()
    return path.resolve().name if path.is_dir() else checkpoint.rpartition("/")[2]


def _output(out: str | None, checkpoint: str, type_name: str) -> Path:
    name = f"{_name(checkpoint)}-{type_name}.gguf"
    if out is None:
        return Path(name)
    path = Path(out).expanduser()
    return path if path.suffix.lower() == ".gguf" and not path.is_dir() else path / name


def _notes(model: Model, found: Sequence[Target], calibration: Calibration | None) -> tuple[str, ...]:
    """What differs from what was asked for."""
    fallen = Counter((t.wanted, t.kind, t.shape[1]) for t in found if t.kind != t.wanted and t.kind != FLOAT)
    notes = [
        f"{count} tensors are {kind} instead of {wanted}, whose blocks do not fill rows of {columns}"
        for (wanted, kind, columns), count in fallen.items()
    ]
    kept = [t for t in found if t.kind == FLOAT != t.wanted]
    if kept:
        notes.append(f"{len(kept)} tensors stay in {FLOAT}: {', '.join(t.name for t in kept[:4])}")
    if calibration is not None and calibration.settings.gradient_tokens:
        notes.append("gptq.gradient_tokens is left out: rows of block formats are solved by themselves")
    return (*model.notes, *notes)


def _told(tally: Tally) -> Iterator[str]:
    """What happened to values on the way."""
    if tally.written_out:
        yield f"{tally.written_out} packed tensors hold the values of the checkpoint's codes, rounded to {FLOAT}"
    raised = {name: count for name, count in tally.raised.items() if count}
    if raised:
        yield (
            f"{sum(raised.values())} groups of weights in {len(raised)} tensors ({', '.join([*raised][:4])}) are too "
            "small for a float16 scale and rounded with its least, 2**-24"
        )


def _targets(source: Checkpoint, model: Model, file: FileType, keep_float: bool) -> list[Target]:
    """The tensors of the file."""
    shapes = list(_parameters(source))
    tied = not any(name.startswith("lm_head.") for name, _ in shapes)
    float_stays = keep_float and bool(source.schemes)
    result = [
        t._replace(kind=FLOAT) if float_stays and t.kind in KINDS and t.module not in source.schemes else t
        for t in targets(model, shapes, file, tied)
    ]
    if model.rope_factors is not None:
        shape = tuple(model.rope_factors.shape)
        result.append(Target(ROPE_FACTORS, "", shape, "F32", "F32", -1, 0))
    return result


def _float_parent(source: Checkpoint, problem: str, type_name: str, run: RunConfig | None) -> str:
    """The float model to solve instead, if there is text to solve it on. Raises ConfigError."""
    parent = recorded_parent(source.directory)
    able = [name for name, file in FILE_TYPES.items() if file.kind != FLOAT and _holds(source, file)]
    values = f"; --type {FLOAT} holds the values of its codes"
    other = f"choose --type {' or '.join(able)}, which holds these codes as they are, or " if able else ""
    if parent is None:
        raise ConfigError(f"{problem}: {other}export the float model it was made from, with --text FILE{values}")
    if run is None:
        raise ConfigError(
            f"{problem}: {other}pass --text FILE, or --config {source.directory / 'ptq_config.yaml'}, to solve the "
            f"float model it was made from, {parent}, for {type_name}{values}"
        )
    require_parent(source.reader, CheckpointReader(locate(parent)), parent)
    return parent


def _holds(source: Checkpoint, file: FileType) -> bool:
    return misfit(source, _targets(source, describe_model(source.hf_config), file, keep_float=True)) is None


def _parameters(source: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of the model, packed weights as if they were dense."""
    for path, module in source.model.named_modules():
        if isinstance(module, QuantLinear):
            yield f"{path}.weight", (module.out_features, module.in_features)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if not source.names.is_tied(name):
                yield name, tuple(parameter.shape)


def _write(job: Job, output: GgufFile, progress: Progress, tally: Tally) -> None:
    stream, hidden, twin_hidden = None, list[Tensor](), list[Tensor]()
    if job.calibration is not None:
        stream = open_stream(job.source, job.calibration.device)
        _check_unsolved(job)
        hidden = stream.enter(job.calibration.batches)
        twin_hidden = list(hidden) if follows_float(job) else []
    for index in range(job.model.blocks):
        started, solved = time.perf_counter(), {}
        if stream is not None:
            solved = solve_block(job, stream, index, hidden, twin_hidden)
        here = _count(solved, tally)
        for target in job.targets:
            if target.block == index:
                output.add(target, _content(job, target, solved, None, tally))
        progress.step(index, job.model.blocks, here, time.perf_counter() - started)
    solved, importance = {}, None
    if stream is not None:
        solved, importance = solve_head(job, stream, hidden)
        _count(solved, tally)
    for target in job.targets:
        if target.block < 0:
            output.add(target, _content(job, target, solved, importance, tally))


def _check_unsolved(job: Job) -> None:
    """Raise NumericsError for NaN or infinity in embedding, norms and biases, which activations would be blamed for."""
    for target in job.targets:
        if target.parameter and (len(target.shape) == 1 or target.name == "token_embd.weight"):
            value = job.source.reader.tensor(job.source.names.of_parameter(target.parameter))
            check_finite(value, target.parameter)


def _count(solved: Mapping[str, SolvedLinear], tally: Tally) -> list[float]:
    """Add what was solved to the tally; its losses as shares of rounding's."""
    losses = [each.solved.loss / each.solved.rounding for each in solved.values() if each.solved.rounding > 0]
    tally.losses += losses
    tally.raised |= {f"{name}.weight": each.raised for name, each in solved.items()}
    return losses


def _content(
    job: Job, target: Target, solved: Mapping[str, SolvedLinear], importance: Tensor | None, tally: Tally
) -> Tensor:
    """What the file holds of one tensor, in the file's order of rows."""
    module = target.module
    if target.name == ROPE_FACTORS:
        assert job.model.rope_factors is not None
        data = job.model.rope_factors
    elif module in solved:
        data = encode(solved[module].solved.blocks)
    elif module in job.source.schemes and target.parameter.endswith(".weight"):
        if target.kind == FLOAT:
            tally.written_out += 1
            data = _float_content(target, dense_weight(job.source, module), None, tally)
        else:
            blocks, off = carry(target.kind, packed_weight(job.source, module), module)
            tally.deviations.append(off)
            data = encode(blocks)
    else:
        value = job.source.reader.tensor(job.source.names.of_parameter(target.parameter))
        data = _float_content(target, value.float(), importance, tally)
    return data[paired_rows(len(data), target.heads)] if target.heads else data


def _float_content(target: Target, value: Tensor, importance: Tensor | None, tally: Tally) -> Tensor:
    check_finite(value, target.parameter)
    if target.kind in KINDS:
        worth = torch.ones(value.shape[1]) if importance is None else importance.cpu()
        tally.raised[target.parameter] = raised_groups(target.kind, value)
        return encode(round_blocks(target.kind, value, worth, target.parameter))
    data = value.to(PLAIN[target.kind])
    if not bool(torch.isfinite(data).all()):
        raise NumericsError(
            f"{target.parameter} must be finite in {target.kind}, which holds at most {LARGEST_HALF:g}; its largest "
            f"value is {float(value.abs().max()):g}: export a block type, or check the checkpoint"
        )
    return data
