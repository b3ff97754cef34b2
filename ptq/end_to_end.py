"""The last unit of a run that refines its model as a whole: it reads what the others wrote, and replaces it."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.journal import Journal
from ptq.plan import Plan, parent_stream, taken_apart
from ptq.progress import Progress
from ptq.refine import refine_model
from ptq.task import ModuleResult


class RefinedModel(NamedTuple):
    """Report rows of all modules, and results that replace those in the journal; none where nothing was gained."""

    rows: dict[str, dict[str, Any]]
    results: dict[str, ModuleResult]


def refine_end_to_end(plan: Plan, batches: Sequence[Tensor], journal: Journal, progress: Progress) -> RefinedModel:
    """Tune all packed weights of a run whose other units are finished.

    The parent, a float32 copy and what an optimizer keeps of every weight are in memory: `ptq.predict` says how much.
    """
    progress.say(f"refining the model as a whole: {plan.config.refine.model_steps} steps")
    stream, device = parent_stream(plan), plan.device
    with ExitStack() as stack:
        stack.enter_context(stream.outer())
        for index in range(len(stream.blocks)):
            stack.enter_context(stream.block(index))
        parent = stream.model.eval()
        student = copy.deepcopy(parent).float()
        _take_over(plan, student, journal)
        start = {}
        for name, scheme in plan.targets.items():
            stored = plan.names.of_module(name)
            tensors = journal.tensors(plan.codec.tensor_names(stored, scheme))
            start[name] = plan.codec.decode(stored, tensors, scheme).to(device)
        refined = refine_model(
            parent, student, start, [batch.to(device) for batch in batches], steps=plan.config.refine.model_steps,
            seed=plan.config.calibration.seed, scale_dtype=plan.dtype, from_parent=plan.config.method != "awq",
        )  # fmt: skip
    gained = refined.after < refined.before
    after = f"{refined.after:.5f} after" if gained else "no less after it: the weights stay as they were"
    progress.say(f"KL divergence to the parent: {refined.before:.5f} before refinement, {after}")
    before, rows = journal.rows, dict[str, dict[str, Any]]()
    for name, quantized in refined.weights.items():
        changed = float((quantized.codes != start[name].codes).float().mean())
        rows[name] = {**before[name], "model_steps": plan.config.refine.model_steps, "model_loss": refined.before,
                      "model_loss_refined": refined.after, "codes_refined_by_model": changed}  # fmt: skip
    return RefinedModel(rows, {name: ModuleResult(q, rows[name]) for name, q in refined.weights.items() if gained})


@torch.no_grad()
def _take_over(plan: Plan, student: nn.Module, journal: Journal) -> None:
    """What a method changed beside the weights it packed: norms that took scales, say."""
    apart, written = taken_apart(plan), journal.names()
    for path, parameter in student.named_parameters():
        name = plan.names.written_as(path, apart)
        if name is not None and name in written and path.removesuffix(".weight") not in plan.targets:
            parameter.copy_(journal.tensors([name])[name])
