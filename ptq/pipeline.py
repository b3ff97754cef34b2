"""One run: plan, calibrate, walk the blocks, write the checkpoint, evaluate, report."""

import io
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.budget_measure import as_chosen, spend
from ptq.calibration.data import token_hash
from ptq.calibration.given import Given
from ptq.config import BitBudget, RunConfig, dump, load_config
from ptq.distributed import ALONE, Ranks
from ptq.errors import ConfigError, FormatError
from ptq.evaluation import evaluate_run, kernels_of, require_text
from ptq.formats.checkpoint import atomic_write_text, read_json
from ptq.formats.staging import json_text
from ptq.journal import Journal
from ptq.journal_directory import MEASURED, RunDirectory, run_directory, what_is_left
from ptq.journal_signature import model_signature, require_same, require_unchanged, signature_of
from ptq.models.description import copy_description
from ptq.models.experts import routers
from ptq.models.tying import state_ties
from ptq.nn.kernels import kernels_recorded
from ptq.page_report import report_page
from ptq.parent import parent_of
from ptq.plan import Plan, block_count, check_output, describe_extra, extra_tensors, head_targets, make_plan
from ptq.plan_size import estimate_size
from ptq.predict import compared, home_of, missing_disk, predict
from ptq.predict_time import measure_rates
from ptq.prepared import Prepared
from ptq.progress import Progress
from ptq.report import PeakMemory, Report, anonymous_bytes, hardware, read_report, resident_bytes, versions
from ptq.version import VERSION
from ptq.walk import units, walk


def quantize(
    config: RunConfig | Mapping[str, Any],
    *,
    calibration: Iterable[Any] | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    prepared: Prepared | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Quantize a model as configured and write the checkpoint and its report to ``config.output``.

    ``config`` may be a mapping with the keys of a YAML file (see `ptq.load_config`). ``calibration`` stands in for
    ``calibration.dataset``: token id sequences, int64 ``[T]`` or ``[B, T]``, each row a sample as it is, whatever
    ``samples`` and ``sequence_length`` say; or strings, tokenized and packed as rows of a file are.

    The checkpoint is written beside its final name and renamed once it is whole; evaluation comes after that, so a
    failure there costs no codes. A run that was cut short, however that happened, is continued by the same call and
    ends with the same bytes; ``fresh`` starts over instead. ``prepared`` is what earlier runs on the same parent
    computed that this one can use. Of several processes (``ranks``) all make the same call; the first one writes, and
    the report of the others is empty.

    Raises:
        ConfigError: the run is described wrongly, or the output exists and ``overwrite`` is false, or a run that was
            cut short had another configuration, model or text, or number of processes.
        DataError: text that is unreadable or too short, or ``calibration`` that is neither of the two.
        RankError: another process has ended.
        PtqError: text, files, numbers or model are not as required; nothing is left under the output's name.
    """
    config = load_config(config) if isinstance(config, Mapping) else config
    if calibration is not None:
        config, prepared = _with_data(config, calibration)
    if ranks.size > 1:
        _check_shared(config, ranks)
    progress, prepared = progress or Progress(), prepared or Prepared()
    if not ranks.first:
        return _follow(config, prepared, ranks)
    started = time.perf_counter()
    check_output(config)
    with run_directory(Path(config.output), overwrite=overwrite, fresh=fresh) as place:
        with progress.stage("plan"):
            plan = _planned(config, ranks)
        report = _finished_before(place, plan, overwrite, prepared, ranks)
        ranks.told(place.path if report is None else None)
        if report is None:
            report = Report(Path(config.output), _described(plan, ranks))
            require_same(ranks, signature_of(plan, None, ranks.size))
            require_text(plan)
            model = model_signature(plan)
            plan, batches = _calibrate(plan, report.document, progress, prepared, ranks)
            _solve_and_write(plan, batches, place, report.document, progress, ranks)
            _write_report(report, place.checkpoint, progress, started)
            require_unchanged(plan, model, "Start over with --fresh once the files are whole")
            place.publish(overwrite)
        else:
            model = model_signature(plan)
            plan = as_chosen(plan, report.document)
            # What a call that makes up for the evaluation may change: another one, or none.
            report.document["configuration"] = asdict(config)
            report.document.pop("evaluation", None)
            if config.evaluation is None:
                _write_again(report, plan.config)
        if config.evaluation is not None:
            with progress.stage("evaluate"), kernels_recorded() as ran:
                evaluation = _evaluated(plan, place)
            require_unchanged(plan, model, f"The checkpoint in {place.final} was made before that and is complete: "
                              "evaluate it with ptq eval once the files are whole")  # fmt: skip
            report.document["evaluation"] = evaluation
            report.document["kernels"] = kernels_of(plan, ran)
            _add_evaluation(report, progress)
            _write_again(report, plan.config)
    return report


def _with_data(config: RunConfig, calibration: Iterable[Any]) -> tuple[RunConfig, Prepared]:
    if not config.calibrates:
        raise ConfigError(
            f"calibration is data for a run that reads text; method {config.method} reads none here: leave calibration "
            "out, or choose gptq or awq"
        )
    given = Given(calibration)
    return replace(config, calibration=given.settings(config.calibration)), Prepared(given)


def _follow(config: RunConfig, prepared: Prepared, ranks: Ranks) -> Report:
    """The part of every process but the first: its share of the work, and of the files its hidden states alone."""
    silent, report = Progress(io.StringIO()), Report(Path(config.output))
    plan = _planned(config, ranks)
    place: Path | None = ranks.told(None)
    if place is not None:
        require_same(ranks, signature_of(plan, None, ranks.size))
        plan, batches = _calibrate(plan, report.document, silent, prepared, ranks)
        mapped = config.calibration.offload == "disk"
        journal = Journal(place, {}, units(plan), mapped=mapped, ranks=ranks)
        walk(plan, ranks.share(batches), journal, silent, ranks, home_of(plan, ranks=ranks))
    return report


def _check_shared(config: RunConfig, ranks: Ranks) -> None:
    alone = {"refine.steps": config.refine.steps, "refine.model_steps": config.refine.model_steps,
             "gptq.gradient_tokens": config.gptq.gradient_tokens}  # fmt: skip
    for name, value in alone.items():
        if value:
            raise ConfigError(
                f"{name} must be 0 where several processes share a run; found {value} with {ranks.size} "
                f"processes: start one, or set {name} to 0"
            )


def _planned(config: RunConfig, ranks: Ranks) -> Plan:
    plan = make_plan(config)
    return plan._replace(device=ranks.device(plan.device))


def _finished_before(
    place: RunDirectory, plan: Plan, overwrite: bool, prepared: Prepared, ranks: Ranks
) -> Report | None:
    """The report of a run like this one that was cut short after its checkpoint was whole."""
    if not place.published:
        return None
    report = Report(Path(plan.config.output), read_report(place.final / "report.json"))
    try:
        steps = report.document["configuration"]["refine"]["model_steps"]
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{place.final / 'report.json'} must be the report of the run that is still to be evaluated; it is not: "
            "start over with --fresh and --overwrite"
        ) from error
    if place.began_as(signature_of(plan, None, ranks.size)) and steps == plan.config.refine.model_steps:
        # The text itself, not the names of its files: whichever of them has changed, the codes would be others.
        text = token_hash(prepared.batches(plan)) if plan.config.calibrates else None
        if text == report.document.get("calibration", {}).get("token_hash"):
            return report
        if not overwrite:
            raise ConfigError(
                f"{place.final}, which is still to be evaluated, was made on another calibration text: name that one, "
                "or pass --overwrite to make it again"
            )
    place.restart(overwrite)
    return None


def _evaluated(plan: Plan, place: RunDirectory) -> dict[str, Any]:
    """As `evaluate_run`; its errors note that the checkpoint is there."""
    try:
        return evaluate_run(plan, Path(plan.config.output))
    except Exception as error:
        error.add_note(what_is_left(place))
        raise


def _described(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    return {
        "versions": versions(),
        "hardware": {**hardware(plan.device), "processes": ranks.size},
        "configuration": asdict(plan.config),
        "parent": parent_of(plan.config.model, plan.directory),
    }


def _rounded(progress: Progress) -> dict[str, float]:
    return {name: round(seconds, 2) for name, seconds in progress.seconds.items()}


def _write_report(report: Report, directory: Path, progress: Progress, started: float) -> None:
    report.document["seconds"] = {**_rounded(progress), "total": round(time.perf_counter() - started, 2)}
    report.document["peak_bytes"] = dict(progress.peaks)
    _write_pages(report, directory)


def _write_pages(report: Report, directory: Path) -> None:
    atomic_write_text(directory / "report.json", json_text(report.document))
    atomic_write_text(directory / "report.html", report_page(report.output.name, report.document))


def _add_evaluation(report: Report, progress: Progress) -> None:
    """What it took, to what the solve took, which may have been in an earlier process."""
    seconds, taken = report.document["seconds"], _rounded(progress)["evaluate"]
    total = seconds["total"] - seconds.get("evaluate", 0.0) + taken
    seconds |= {"evaluate": taken, "total": round(total, 2)}
    seconds["total"] = seconds.pop("total")  # the last line
    report.document["peak_bytes"]["evaluate"] = progress.peaks["evaluate"]


def _write_again(report: Report, config: RunConfig) -> None:
    """Report and configuration of a checkpoint that is in its place, with the evaluation that was made."""
    atomic_write_text(report.output / "ptq_config.yaml", dump(config))
    _write_pages(report, report.output)


def _calibrate(
    plan: Plan, document: dict[str, Any], progress: Progress, prepared: Prepared, ranks: Ranks
) -> tuple[Plan, list[Tensor]]:
    """Text for the solver; where there is a bit budget, the plan with the width of every Linear chosen."""
    config = plan.config
    if not config.calibrates:
        return plan, []
    with progress.stage("calibration text"):
        batches = prepared.batches(plan)
    require_same(ranks, {"calibration text": token_hash(batches)})
    document["calibration"] = {
        "sequences": sum(len(b) for b in batches),
        "tokens": sum(b.numel() for b in batches),
        "token_hash": token_hash(batches),
        "seed": config.calibration.seed,
    }
    if isinstance(config.bits, BitBudget):
        with progress.stage("budget", block_count(plan)):
            measured = ranks.told(prepared.measured(plan, progress) if ranks.first else [])
            plan, document["budget"] = spend(plan, measured)
    return plan, batches if config.solves_with_text or config.refine.model_steps else []


def _solve_and_write(
    plan: Plan, batches: list[Tensor], place: RunDirectory, document: dict[str, Any], progress: Progress, ranks: Ranks
) -> None:
    config = plan.config
    mapped = config.calibration.offload == "disk"
    signature = signature_of(plan, batches, ranks.size)
    journal = Journal(place.path, signature, units(plan), mapped=mapped, ranks=ranks)
    resumed, measured = len(journal.records), (place.path / MEASURED).exists()
    if resumed:
        progress.say(f"continuing a run that was cut short: {min(resumed, block_count(plan))} blocks are finished")
    elif measured:
        progress.say("continuing a run that was cut short: its gradients are there, no block is finished")
    if resumed or measured or journal.notes:
        document["resumed"] = {"blocks": min(resumed, block_count(plan)), "notes": journal.notes,
                               "seconds_before": round(sum(r.seconds for r in journal.records), 2)}  # fmt: skip
    for note in journal.notes:
        progress.say(note)
    extra = extra_tensors(plan)
    if extra:
        progress.say(describe_extra(extra))
    before = resident_bytes()
    home = home_of(plan, ranks=ranks)
    prediction = predict(plan, measure_rates(plan.device, place.path, plan.dtype), anonymous_bytes(), home)
    if not resumed and (short := missing_disk(prediction, config)):
        progress.say(f"{short}; should it run full, the same command goes on once there is space")
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)  # of other runs in this process
    started = time.perf_counter()
    with PeakMemory() as peak, progress.stage("solve", max(0, block_count(plan) - resumed)):
        walk(plan, ranks.share(batches), journal, progress, ranks, home)
    with progress.stage("write"):
        journal.assemble(config.max_shard_bytes)
        _write_description(plan, place.checkpoint)
    if not (resumed or measured):
        used = peak.bytes if plan.device.type == "cpu" else torch.cuda.max_memory_allocated(plan.device)
        document["prediction"] = compared(prediction, used, time.perf_counter() - started)
    size = estimate_size(plan)
    document["journal"] = {"seconds": round(journal.seconds, 3)}  # what being able to go on took
    document["memory"] = {"before_solve": before, "peak_of_solve": progress.peaks["solve"]}
    if plan.device.type == "cuda":
        document["memory"]["second_moments"] = str(home)
        document["memory"]["peak_on_gpu"] = torch.cuda.max_memory_allocated(plan.device)
    document["size"] = {
        "before": size.before,
        "after": sum(f.stat().st_size for f in place.checkpoint.glob("*.safetensors")),
        "bits_per_weight": size.bits_per_weight,
    }
    rows = journal.rows
    for group in document.get("budget", {}).get("groups", ()):
        for name, loss in group["predicted_relative_loss"].items():
            rows[name]["predicted_relative_loss"] = loss  # beside the measured one
    document["modules"] = rows
    document["kept_in_float"] = [name for name, scheme in plan.schemes.items() if scheme is None]
    document["extra_tensors"] = extra


def _write_description(plan: Plan, staged: Path) -> None:
    """``config.json`` with the quantization, the tokenizer and everything else a loader looks for."""
    settings = read_json(plan.directory / "config.json")
    damping = plan.config.gptq.damping if plan.config.method == "gptq" else None
    # Other engines take these for Linears and must be told to leave them in float: routers that are none here, and what
    # a larger model has besides this one (an encoder, a reward's head, layers that predict more tokens).
    beside = [name for name in extra_tensors(plan) if name.endswith(".weight") and len(plan.reader.spec(name)[1]) == 2]
    apart = [name.removesuffix(".weight") for name in beside]
    schemes = {**plan.schemes, **dict.fromkeys([*routers(plan.skeleton), *apart])}
    named = plan.names.both_spellings(schemes, whole=plan.codec.name != "awq")
    quantization = plan.codec.quantization_config(named, damping=damping, version=VERSION)
    settings["quantization_config"] = quantization
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(plan.dtype).removeprefix("torch.")
    state_ties(plan.hf_config, settings)
    if any(plan.names.is_tied(f"{name}.weight") for name in head_targets(plan)):
        settings["tie_word_embeddings"] = False  # a packed head cannot share the embedding's storage
    copy_description(plan.directory, staged)
    atomic_write_text(staged / "config.json", json.dumps(settings, indent=2) + "\n")
    if quantization["quant_method"] == "gptq":
        atomic_write_text(staged / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")
    atomic_write_text(staged / "ptq_config.yaml", dump(plan.config))
