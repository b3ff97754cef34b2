"""One run: plan, calibrate, walk the blocks, write the checkpoint, evaluate, report."""

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.block import quantize_block
from ptq.calibration.capture import Run
from ptq.calibration.data import calibration_batches, token_hash
from ptq.config import RunConfig, dump
from ptq.evaluation import evaluate_run
from ptq.formats.checkpoint import ShardWriter, atomic_write_text, read_json, staged_directory
from ptq.formats.codec import Scheme
from ptq.grid import check_finite
from ptq.models.loading import load_tokenizer, working_dtype
from ptq.models.streamed import StreamedModel
from ptq.nn.linear import kernels_in_use
from ptq.plan import Plan, check_output, estimate_size, make_plan, parent_stream, replaced_tensors
from ptq.progress import Progress
from ptq.report import Report, hardware, resident_bytes, start_counting_peak, versions
from ptq.task import BlockTask, FloatTwin, ModuleResult
from ptq.version import VERSION

# Weights and what describes them are written anew; everything else beside them is the parent's.
NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf",
              "config.json", "quantize_config.json", "report.json", ".*", "*.md", "LICENSE*", "original")  # fmt: skip


def quantize(config: RunConfig, *, overwrite: bool = False, progress: Progress | None = None) -> Report:
    """Quantize a model as configured and write the checkpoint and its report to ``config.output``.

    The checkpoint is written beside its final name and renamed once it is whole; evaluation comes after that, so a
    failure there costs no codes.

    Raises:
        ConfigError: the run is described wrongly, or the output exists and ``overwrite`` is false.
        PtqError: text, files, numbers or model are not as required; nothing is left under the output's name.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    output = Path(config.output)
    check_output(config)
    with staged_directory(output, overwrite) as staged:
        with progress.stage("plan"):
            plan = make_plan(config)
        document = _solve_and_write(plan, staged, progress)
        report = Report(output, document)
        document["seconds"] = {**_rounded(progress), "total": round(time.perf_counter() - started, 2)}
        _write_report(report, staged)
    if config.evaluation is not None:
        with progress.stage("evaluate"):
            document["evaluation"] = evaluate_run(plan, output)
        document["kernels"] = kernels_in_use()
        document["seconds"] = {**_rounded(progress), "total": round(time.perf_counter() - started, 2)}
        _write_report(report, output)
    return report


def _rounded(progress: Progress) -> dict[str, float]:
    return {name: round(seconds, 2) for name, seconds in progress.seconds.items()}


def _write_report(report: Report, directory: Path) -> None:
    atomic_write_text(directory / "report.json", json.dumps(report.document, indent=1) + "\n")


def _solve_and_write(plan: Plan, staged: Path, progress: Progress) -> dict[str, Any]:
    config = plan.config
    document: dict[str, Any] = {
        "versions": versions(),
        "hardware": hardware(plan.device),
        "configuration": asdict(config),
    }
    batches: list[Tensor] = []
    if config.method != "rtn":
        with progress.stage("calibration text"):
            batches = calibration_batches(config.calibration, load_tokenizer(plan.directory, config.trust_remote_code))
        document["calibration"] = {
            "sequences": sum(len(b) for b in batches),
            "tokens": sum(b.numel() for b in batches),
            "token_hash": token_hash(batches),
            "seed": config.calibration.seed,
        }
    start_counting_peak()
    before = resident_bytes()
    writer = ShardWriter(staged, config.max_shard_bytes)
    rows: dict[str, dict[str, Any]] = {}
    with progress.stage("solve", len(plan.skeleton.get_submodule(plan.blocks)._modules)):
        for results, tensors in _walk(plan, batches, progress):
            rows.update({name: result.row for name, result in results.items()})
            writer.add(tensors)
    with progress.stage("write"):
        writer.finish()
        _write_description(plan, staged)
    size = estimate_size(plan)
    document["memory"] = {"before_solve": before, "peak_of_solve": resident_bytes(peak=True)}
    if plan.device.type == "cuda":
        document["memory"]["peak_on_gpu"] = torch.cuda.max_memory_allocated(plan.device)
    document["size"] = {
        "before": size.before,
        "after": sum(f.stat().st_size for f in staged.glob("*.safetensors")),
        "bits_per_weight": size.bits_per_weight,
    }
    document["modules"] = rows
    document["kept_in_float"] = [name for name, scheme in plan.schemes.items() if scheme is None]
    return document


Finished = tuple[dict[str, ModuleResult], dict[str, Tensor]]


def _walk(plan: Plan, batches: list[Tensor], progress: Progress) -> Iterator[Finished]:
    """Block by block: results, and the tensors the checkpoint holds in place of the parent's."""
    stream = parent_stream(plan)
    hidden = stream.enter(batches) if batches else []
    # What the float model has at the same place; followed only where the solver corrects for the difference.
    float_hidden = list(hidden) if plan.config.method == "gptq" and plan.config.gptq.correct_inputs else []
    total = len(stream.blocks)
    for index in range(total):
        started = time.perf_counter()
        path = stream.block_path(index)
        with stream.block(index) as block:
            _check_weights(block, path)
            twin = _twin(stream, index, block, float_hidden) if float_hidden else None
            probe = _probe(stream, index, hidden)
            task = BlockTask(path, _below(path, plan.targets), plan.config, plan.dtype, probe, twin)
            runs = [_runner(stream, index, i, hidden) for i in range(len(hidden))]
            progress.module(path)
            found = quantize_block(block, runs, task) if task.schemes else {}
            if twin is not None and index + 1 < total:
                float_hidden = [run().cpu() for run in twin.runs]
            if index + 1 < total or _head_targets(plan):
                for i in range(len(hidden)):
                    hidden[i] = stream.run_block(index, i, hidden[i]).cpu()
            results = {f"{path}.{name}": result for name, result in found.items()}
            tensors = _block_tensors(plan, path, block, results)
        rows = [result.row.get("loss_to_rounding") for result in results.values()]
        losses = [loss for loss in rows if isinstance(loss, float)]
        progress.step(index, total, losses, time.perf_counter() - started)
        yield results, tensors
    yield _outer(plan, stream, batches, hidden)


def _below(path: str, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    return {name.removeprefix(path + "."): s for name, s in schemes.items() if name.startswith(path + ".")}


def _runner(stream: StreamedModel, index: int, batch: int, hidden: list[Tensor]) -> Run:
    return lambda: stream.run_block(index, batch, hidden[batch])


def _probe(stream: StreamedModel, index: int, hidden: list[Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda module: stream.run_in_place(index, module, hidden[0])


def _twin(stream: StreamedModel, index: int, block: nn.Module, hidden: list[Tensor]) -> FloatTwin:
    twin = copy.deepcopy(block)
    return FloatTwin(twin, [partial(stream.run_as_block, index, twin, i, each) for i, each in enumerate(hidden)])


def _block_tensors(plan: Plan, path: str, block: nn.Module, results: Mapping[str, ModuleResult]) -> dict[str, Tensor]:
    """A finished block as it stands in the checkpoint: packed weights, and the rest as it is now."""
    tensors: dict[str, Tensor] = {}
    for local, value in block.state_dict().items():
        module, _, leaf = f"{path}.{local}".rpartition(".")
        if module in results and leaf == "weight":
            tensors |= _encode(plan, module, results[module])
        elif (name := plan.names.find(f"{path}.{local}")) is not None:
            tensors[name] = value.detach().cpu().contiguous()
    return tensors


def _encode(plan: Plan, module: str, result: ModuleResult) -> dict[str, Tensor]:
    cpu = result.quantized._replace(
        codes=result.quantized.codes.cpu(), scales=result.quantized.scales.cpu(), zeros=result.quantized.zeros.cpu()
    )
    return plan.codec.encode(plan.names.of_module(module), cpu, plan.codec.scales_dtype(plan.dtype))


def _head_targets(plan: Plan) -> dict[str, Scheme]:
    return {name: scheme for name, scheme in plan.targets.items() if not name.startswith(plan.blocks + ".")}


def _outer(plan: Plan, stream: StreamedModel, batches: list[Tensor], hidden: list[Tensor]) -> Finished:
    """What is not a block: the head where it is to be quantized, the rest copied from the parent."""
    results: dict[str, ModuleResult] = {}
    targets = _head_targets(plan)
    if targets:
        with stream.outer():
            for name in targets:
                _check_weights(stream.model.get_submodule(name), name)
            runs = [_head_runner(stream, batch, h) for batch, h in zip(batches, hidden, strict=True)]
            results = quantize_block(stream.model, runs, BlockTask("", targets, plan.config, plan.dtype))
    blocks = plan.skeleton.get_submodule(plan.blocks).state_dict()
    written = {plan.names.find(f"{plan.blocks}.{local}") for local in blocks} | replaced_tensors(plan)
    tensors: dict[str, Tensor] = {}
    for name in plan.reader.names():
        if name not in written:
            value = plan.reader.tensor(name)
            if value.is_floating_point():
                check_finite(value, name)
            tensors[name] = value.to(working_dtype(plan.skeleton, name, value, plan.dtype))
    for name, result in results.items():
        tensors |= _encode(plan, name, result)
    return results, tensors


def _check_weights(module: nn.Module, path: str) -> None:
    for name, parameter in module.named_parameters():
        check_finite(parameter, f"{path}.{name}")


def _head_runner(stream: StreamedModel, batch: Tensor, hidden: Tensor) -> Callable[[], Tensor]:
    return lambda: stream.logits(batch, hidden)


def _write_description(plan: Plan, staged: Path) -> None:
    """``config.json`` with the quantization, the tokenizer and everything else a loader looks for."""
    settings = read_json(plan.directory / "config.json")
    damping = plan.config.gptq.damping if plan.config.method == "gptq" else None
    quantization = plan.codec.quantization_config(plan.schemes, damping=damping, version=VERSION)
    settings["quantization_config"] = quantization
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(plan.dtype).removeprefix("torch.")
    if any(plan.names.is_tied(f"{name}.weight") for name in _head_targets(plan)):
        settings["tie_word_embeddings"] = False  # a packed head cannot share the embedding's storage
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    entries = list(plan.directory.iterdir())
    skipped = ignore(str(plan.directory), [e.name for e in entries])
    for entry in entries:
        if entry.is_file() and entry.name not in skipped:
            shutil.copyfile(entry, staged / entry.name)
    atomic_write_text(staged / "config.json", json.dumps(settings, indent=2) + "\n")
    if quantization["quant_method"] == "gptq":
        atomic_write_text(staged / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")
    atomic_write_text(staged / "ptq_config.yaml", dump(plan.config))

