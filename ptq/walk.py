"""Block by block through a model: quantize, hand the result to the journal, run the block for the next one."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.allocator import give_back
from ptq.block import quantize_block
from ptq.calibration.held import Run, held
from ptq.config import RefineConfig
from ptq.distributed import ALONE, Ranks
from ptq.end_to_end import refine_end_to_end
from ptq.formats.codec import Scheme
from ptq.grid import check_finite
from ptq.half_products import fast_half_products
from ptq.journal import Journal, Streams
from ptq.models.loading import working_dtype
from ptq.models.streamed import StreamedModel
from ptq.output_moments import OutputMoments, opened_moments, output_moments
from ptq.plan import Plan, block_count, extra_tensors, head_targets, parent_stream, replaced_tensors, taken_apart
from ptq.progress import Progress
from ptq.task import BlockTask, FloatTwin, ModuleResult

# What the passes that wait may hold, of the quantized model and of the float model each.
HELD_BYTES = 1 << 29


class Finished(NamedTuple):
    """Results, by module, and the tensors that the checkpoint holds in place of the parent's."""

    results: dict[str, ModuleResult]
    tensors: dict[str, Tensor]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Of the report."""
        return {name: result.row for name, result in self.results.items()}


class Walk(NamedTuple):
    """What a walk works with. ``hidden`` and ``floating`` are updated in place from block to block."""

    plan: Plan
    stream: StreamedModel
    batches: Sequence[Tensor]
    hidden: list[Tensor]  # what the next block reads, [B, T, C] a batch; empty where nothing is calibrated
    floating: list[Tensor]  # the same in the float model; followed only where the solver corrects for the difference
    ranks: Ranks
    home: torch.device  # of second moments
    moments: OutputMoments | None = None

    def streams(self) -> Streams:
        """The hidden states by name."""
        return {name: each for name, each in (("quantized", self.hidden), ("float", self.floating)) if each}


def units(plan: Plan) -> int:
    """What a walk finishes one after another: the blocks, the rest of the model, and where it is asked refinement."""
    return block_count(plan) + 1 + (plan.config.refine.model_steps > 0)


def walk(
    plan: Plan,
    batches: Sequence[Tensor],
    journal: Journal,
    progress: Progress,
    ranks: Ranks = ALONE,
    home: torch.device | None = None,
) -> None:
    """Finish every unit of a run that the journal does not hold yet.

    Of several processes that share a run each has ``batches`` of its own. Second moments lie on ``home``, by default
    the plan's device.
    """
    with fast_half_products(plan.device):
        if len(journal.records) <= block_count(plan):
            text = batches if plan.config.solves_with_text else []
            _walk_blocks(plan, text, journal, progress, ranks, home or plan.device)
        _refine_model(plan, batches, journal, progress)


def _refine_model(plan: Plan, batches: Sequence[Tensor], journal: Journal, progress: Progress) -> None:
    """Where it is asked for, and was not done with as many steps."""
    steps = plan.config.refine.model_steps
    if journal.records[-1].replaces and next(iter(journal.records[-1].rows.values()))["model_steps"] != steps:
        journal.drop_last()
    if len(journal.records) < units(plan):
        started = time.perf_counter()
        refined = refine_end_to_end(plan, batches, journal, progress)
        journal.add(refined.rows, _encoded(plan, refined.results), {}, time.perf_counter() - started, replaces=True)


def _walk_blocks(
    plan: Plan, batches: Sequence[Tensor], journal: Journal, progress: Progress, ranks: Ranks, home: torch.device
) -> None:
    """Blocks, and what is not in the blocks."""
    total, first = block_count(plan), len(journal.records)
    moments = _measured(plan, batches, journal, progress) if first < total else None
    state = _enter(plan, batches, journal, ranks)._replace(home=home, moments=moments)
    for index in range(first, total):
        started = time.perf_counter()
        progress.module(state.stream.block_path(index))
        finished = _quantize(state, index, journal)
        journal.add(finished.rows, finished.tensors, state.streams() if _read_after(plan, index) else {},
                    time.perf_counter() - started)  # fmt: skip
        give_back()
        rows = [result.row.get("loss_to_rounding") for result in finished.results.values()]
        losses = [loss for loss in rows if isinstance(loss, float)]
        progress.step(index, total, losses, time.perf_counter() - started)
    started = time.perf_counter()
    finished = _outer(state)
    journal.add(finished.rows, finished.tensors, {}, time.perf_counter() - started)


def _measured(plan: Plan, batches: Sequence[Tensor], journal: Journal, progress: Progress) -> OutputMoments | None:
    if not plan.config.gptq.gradient_tokens:
        return None
    started = time.perf_counter()
    found = opened_moments(journal.outputs, block_count(plan))  # by a run that was cut short
    if found is None:
        progress.say("taking gradients through the float model ...")
        found = output_moments(plan, batches, journal.outputs)
        progress.say(f"gradients of {found.tokens} tokens: {time.perf_counter() - started:.1f} s")
    give_back()
    return found


def _enter(plan: Plan, batches: Sequence[Tensor], journal: Journal, ranks: Ranks) -> Walk:
    """At the first block, or where an earlier process left off: there the hidden states are those it wrote."""
    stream = parent_stream(plan)
    if not batches:
        return Walk(plan, stream, batches, [], [], ranks, plan.device)
    follow, probed = plan.config.follows_float, plan.config.method == "awq"
    if not journal.records:
        hidden = stream.enter(batches, journal.keeper(0, "quantized"), probed=probed)
        return Walk(plan, stream, batches, hidden, list(hidden) if follow else [], ranks, plan.device)
    stream.enter(batches, lambda first: first.new_empty(0), probed=probed)  # what every block is called with
    kept = journal.restore()
    return Walk(plan, stream, batches, kept.get("quantized", []), kept.get("float", []), ranks, plan.device)


def _quantize(state: Walk, index: int, journal: Journal) -> Finished:
    """Quantize one block and replace the hidden states by what it puts out."""
    plan, stream, hidden = state.plan, state.stream, state.hidden
    path = stream.block_path(index)
    with stream.block(index) as block:
        _check_weights(block, path)
        twin = _twin(state, index, block) if state.floating else None
        probe, schemes = _probe(stream, index, hidden), _below(path, plan.targets)
        task = BlockTask(path, schemes, plan.config, plan.dtype, probe, twin, state.ranks, state.home,
                         moments=partial(state.moments.of, index) if state.moments else None)  # fmt: skip
        runs = waiting(partial(stream.run_block, index), hidden, _widest(plan, path))
        found = quantize_block(block, runs, task) if task.schemes else {}
        if twin is not None and index + 1 < block_count(plan):
            _advance(state.floating, twin.runs, journal.keeper(index + 1, "float"))
        else:
            state.floating.clear()
        if _read_after(plan, index):
            _advance(hidden, runs, journal.keeper(index + 1, "quantized"))
        results = {f"{path}.{name}": result for name, result in found.items()}
        return Finished(results, _block_tensors(plan, path, block, results) if state.ranks.first else {})


def _read_after(plan: Plan, index: int) -> bool:
    """Whether anything reads what a block puts out: the next block, or a head that is quantized."""
    return index + 1 < block_count(plan) or bool(head_targets(plan))


def _advance(hidden: list[Tensor], runs: Sequence[Run], keep: Callable[[Tensor], Tensor]) -> None:
    """One batch after another, so that no second copy of all of them is ever held."""
    for i, run in enumerate(runs):
        hidden[i] = keep(run().cpu())


def _below(path: str, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    return {name.removeprefix(path + "."): s for name, s in schemes.items() if name.startswith(path + ".")}


def _probe(stream: StreamedModel, index: int, hidden: list[Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda module: stream.run_probe(index, module, hidden[0])


def _twin(state: Walk, index: int, block: nn.Module) -> FloatTwin:
    twin, widest = copy.deepcopy(block), _widest(state.plan, state.stream.block_path(index))
    return FloatTwin(twin, waiting(partial(state.stream.run_as_block, index, twin), state.floating, widest))


def _widest(plan: Plan, path: str) -> int:
    """Inputs of the widest Linear of a block that is to be quantized."""
    return max((plan.shapes[name][1] for name in plan.targets if name.startswith(path + ".")), default=0)


def waiting(run: Callable[[int, Tensor], Tensor], hidden: Sequence[Tensor], widest: int) -> list[Run]:
    """Runs of a block, of which as many wait for its Linears as memory is set aside for.

    Args:
        run: of the block, on a batch by its number and the hidden states of that.
        hidden: of all batches; each run takes what stands there when it begins.
        widest: inputs of the widest Linear that is waited for.
    """

    def on(batch: int) -> Run:
        return lambda: run(batch, hidden[batch])

    sizes = [h.shape[:-1].numel() * (h.shape[-1] + widest) * h.dtype.itemsize for h in hidden]
    return held([on(batch) for batch in range(len(hidden))], sizes, HELD_BYTES)


def _block_tensors(plan: Plan, path: str, block: nn.Module, results: Mapping[str, ModuleResult]) -> dict[str, Tensor]:
    """A finished block as it stands in the checkpoint: packed weights, and the rest as it is now."""
    tensors: dict[str, Tensor] = {}
    apart = taken_apart(plan)
    for local, value in block.state_dict().items():
        module, _, leaf = f"{path}.{local}".rpartition(".")
        if module in results and leaf == "weight":
            tensors |= _encode(plan, module, results[module])
        elif (name := plan.names.written_as(f"{path}.{local}", apart)) is not None:
            tensors[name] = value.detach().cpu().contiguous()
    return tensors


def _encoded(plan: Plan, results: Mapping[str, ModuleResult]) -> dict[str, Tensor]:
    return {name: tensor for path, result in results.items() for name, tensor in _encode(plan, path, result).items()}


def _encode(plan: Plan, module: str, result: ModuleResult) -> dict[str, Tensor]:
    stored, scales_dtype = plan.names.of_module(module), plan.codec.scales_dtype(plan.dtype)
    return plan.codec.encode(stored, result.quantized.to("cpu"), scales_dtype)


def _outer(state: Walk) -> Finished:
    """What is not a block: the head where it is to be quantized, the rest copied from the parent."""
    plan, stream = state.plan, state.stream
    results: dict[str, ModuleResult] = {}
    targets = head_targets(plan)
    if targets:
        with stream.outer():
            for name in targets:
                _check_weights(stream.model.get_submodule(name), name)
            runs = [partial(stream.logits, batch, h) for batch, h in zip(state.batches, state.hidden, strict=True)]
            config = replace(plan.config, refine=RefineConfig())  # a head alone is what its solver optimizes already
            task = BlockTask("", targets, config, plan.dtype, ranks=state.ranks, home=state.home)
            results = quantize_block(stream.model, runs, task)
    if not state.ranks.first:
        return Finished(results, {})
    blocks = plan.skeleton.get_submodule(plan.blocks).state_dict()
    written = {plan.names.find(f"{plan.blocks}.{local}") for local in blocks} | replaced_tensors(plan)
    tensors: dict[str, Tensor] = {}
    extra = set(extra_tensors(plan))
    for name in plan.reader.names():
        if name not in written:
            value = tensors[name] = plan.reader.tensor(name)
            if name in extra:  # nothing of the model's: as it is, whatever it holds
                continue
            if value.is_floating_point():
                check_finite(value, name)
            tensors[name] = value.to(working_dtype(plan.skeleton, name, value, plan.dtype))
    return Finished(results, tensors | _encoded(plan, results))


def _check_weights(module: nn.Module, path: str) -> None:
    for name, parameter in module.named_parameters():
        check_finite(parameter, f"{path}.{name}")
