"""Solving a float model, or what a checkpoint left in float, for the block formats of a GGUF file."""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import collect, trace_groups
from ptq.calibration.data import calibration_batches
from ptq.calibration.held import Run
from ptq.config import GPTQConfig, RunConfig
from ptq.errors import ConfigError
from ptq.gguf.block import BlockFormats, SolvedLinear, solve_linears
from ptq.gguf.blocks import KINDS
from ptq.gguf.layout import Model, Target
from ptq.models.streamed import StreamedModel
from ptq.plan import resolve_device
from ptq.runtime import Checkpoint
from ptq.task import FloatTwin
from ptq.walk import waiting


class Calibration(NamedTuple):
    """Text to solve on, and how."""

    batches: list[Tensor]
    settings: GPTQConfig
    strict: bool
    device: torch.device


class Job(NamedTuple):
    """One export, checked."""

    source: Checkpoint
    model: Model
    targets: list[Target]
    calibration: Calibration | None


def is_solved(source: Checkpoint, target: Target) -> bool:
    """Whether a tensor needs text: a float one that becomes blocks, the embedding too where it serves as the head."""
    is_input = target.name == "token_embd.weight"
    packed = target.module in source.schemes
    return target.kind in KINDS and not packed and not is_input


def calibration_for(run: RunConfig | None, source: Checkpoint, tokenizer: Any, type_name: str) -> Calibration:
    """The text that a run's configuration names. Raises ConfigError where there is none, or it is too long."""
    if run is None:
        raise ConfigError(
            f"a float model is solved for {type_name} on text: pass --text FILE or --config FILE, or export F16"
        )
    limit = source.hf_config.max_position_embeddings
    if run.calibration.sequence_length > limit:
        raise ConfigError(
            f"calibration sequences must be at most the model's context of {limit} tokens; found "
            f"{run.calibration.sequence_length}: pass a shorter --length"
        )
    batches = calibration_batches(run.calibration, tokenizer)
    return Calibration(batches, run.gptq, run.strict, resolve_device(run.device))


def follows_float(job: Job) -> bool:
    """Whether the float model is run beside, to correct for what the solved blocks change."""
    assert job.calibration is not None
    return not job.source.schemes and job.calibration.settings.correct_inputs > 0


def solve_block(
    job: Job, stream: StreamedModel, index: int, hidden: list[Tensor], twin_hidden: list[Tensor]
) -> dict[str, SolvedLinear]:
    """Solve one block and advance both streams of hidden states; results by the Linear's path in the model."""
    assert job.calibration is not None
    path = stream.block_path(index)
    with stream.block(index) as block:
        widest = max(
            (t.shape[1] for t in job.targets if t.parameter.startswith(f"{path}.") and len(t.shape) > 1), default=0
        )
        runs = waiting(partial(stream.run_block, index), hidden, widest)
        twin = None
        if twin_hidden:
            copied = copy.deepcopy(block)
            twin = FloatTwin(copied, waiting(partial(stream.run_as_block, index, copied), twin_hidden, widest))
        task = BlockFormats(path, _kinds(job, path), job.calibration.settings, job.calibration.strict, twin)
        solved = solve_linears(block, runs, task)
        if twin is not None:
            twin_hidden[:] = [run().cpu() for run in twin.runs]
        hidden[:] = [run().cpu() for run in runs]
    return {f"{path}.{name}": each for name, each in solved.items()}


def _kinds(job: Job, path: str) -> dict[str, str]:
    """Float Linears below a path that become blocks."""
    return {
        target.module.removeprefix(f"{path}."): target.kind
        for target in job.targets
        if target.parameter.startswith(f"{path}.") and is_solved(job.source, target)
    }


def solve_head(job: Job, stream: StreamedModel, hidden: list[Tensor]) -> tuple[dict[str, SolvedLinear], Tensor | None]:
    """The output head solved; or, where the embedding serves as one, what each of its columns is worth."""
    assert job.calibration is not None
    head = next((t for t in job.targets if t.name == "output.weight"), None)
    embedding = next(t for t in job.targets if t.name == "token_embd.weight")
    with stream.outer():
        pairs = zip(job.calibration.batches, hidden, strict=True)
        runs: list[Run] = [partial(stream.logits, batch, h) for batch, h in pairs]
        if head is not None:
            if not is_solved(job.source, head):
                return {}, None
            kinds = {head.module: head.kind}
            return solve_linears(stream.model, runs, BlockFormats("", kinds, *job.calibration[1:3])), None
        if embedding.kind not in KINDS:
            return {}, None
        modules: dict[str, nn.Module] = {"lm_head": stream.model.get_submodule("lm_head")}
        stats = collect(modules, trace_groups(modules, runs[:1]), runs)[0]
        diagonal = stats.hessian.diagonal()
        # As an embedding every column counts alike; as a head, by its input.
        return {}, diagonal + diagonal.mean()
