"""What a run will need, from the shapes of a model alone: memory, disk and time, by stage.

Memory is anonymous memory (maps of files do not count: the system takes them back when it needs to). How it is made up
is in `ptq.predict_memory`, how time is in `ptq.predict_time`.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ptq.config import RunConfig
from ptq.distributed import ALONE, Ranks
from ptq.errors import ConfigError
from ptq.formats.staging import output_path
from ptq.journal import KEPT
from ptq.journal_directory import place_of
from ptq.plan import Plan, block_count
from ptq.plan_size import estimate_size
from ptq.predict_memory import (
    FLOAT,
    block_work,
    evaluation_work,
    gradient_tokens,
    gradient_work,
    head_work,
    largest_block,
    model_work,
    moment_bytes,
    outer_bytes,
    tokens_of,
    width,
)
from ptq.predict_time import Rates, seconds_of

# Of a GPU's free memory: the rest goes to fragments and to what libraries allocate.
SHARE_OF_GPU = 0.9


class Prediction(NamedTuple):
    """Bytes and seconds."""

    memory: dict[str, int]  # parts of the peak, on the device that solves
    host: dict[str, int]  # parts of the peak beside a GPU; empty without one
    disk: dict[str, int]
    seconds: dict[str, float]  # of the solve
    evaluation: dict[str, int]  # parts of the peak of the evaluation that follows; empty without one

    @property
    def peak(self) -> int:
        """Bytes on the device that solves, until the checkpoint is written."""
        return sum(self.memory.values())


def predict(plan: Plan, rates: Rates, base: int = 0, home: torch.device | None = None) -> Prediction:
    """What the run of a plan will need.

    Args:
        plan: resolved; no weight is read.
        rates: of the machine.
        base: bytes that the process holds before it starts.
        home: where second moments lie, as `home_of` says; by default on the plan's device.
    """
    block, outer = largest_block(plan), outer_bytes(plan)
    hidden = _hidden_bytes(plan)
    streams = 2 if plan.config.follows_float else 1
    kept_in_memory = hidden * streams if plan.config.calibration.offload == "memory" else 0
    apart = home is not None and home != plan.device
    moments, work = block_work(plan, block, apart=apart)
    host: dict[str, int] = {}
    if apart:
        host |= moments
    else:
        work = {**moments, **work}
    memory = {"process": base}
    stages = [
        {"block": block.parameters, "float block": block.parameters * (streams - 1), **work},
        {"block": block.parameters, "embeddings and head": outer},
        {"embeddings and head": outer, **head_work(plan, apart=apart)},
    ]
    largest = max(stages, key=lambda parts: sum(parts.values()))
    memory |= largest
    if plan.device.type == "cuda":
        host |= {"process": base, "hidden states": kept_in_memory, "finished block": block.parameters}
        memory["process"] = 0
    else:
        memory["hidden states"] = kept_in_memory
    tokens = gradient_tokens(plan)
    if tokens:
        waiting = FLOAT * tokens * width(plan)
        around = {"process": memory["process"], "hidden states": 0 if plan.device.type == "cuda" else waiting}
        memory = max(memory, {**around, **gradient_work(plan, block)}, key=lambda parts: sum(parts.values()))
    if plan.config.refine.model_steps:
        whole = {"process": memory["process"], **model_work(plan, block)}
        memory = max(memory, whole, key=lambda parts: sum(parts.values()))
    size = estimate_size(plan)
    shard = min(size.after, plan.config.max_shard_bytes)
    journal = hidden * streams * (KEPT + 1)
    disk = {"output": size.after, "shard in the making": shard, "journal of hidden states": journal}
    if tokens:
        # What the float model's blocks read is gone before anything else is written, and may take the place of it.
        before = FLOAT * tokens * width(plan) * (block_count(plan) + 1)
        later = sum(disk.values())
        disk["gradients"] = block_count(plan) * moment_bytes(block) + max(0, before - later)
    if plan.config.refine.model_steps:
        disk["refined weights"] = size.after  # beside those they replace
    evaluation = evaluation_work(plan)
    if evaluation and plan.device.type == "cuda":
        del evaluation["hidden states"]  # on the host, as before
    elif evaluation:
        evaluation = {"process": base, **evaluation}
    seconds = seconds_of(plan, block, rates, disk, 1 / (KEPT + 1))
    return Prediction({k: v for k, v in memory.items() if v}, host, disk, seconds, evaluation)


def home_of(plan: Plan, room: int | None = None, ranks: Ranks = ALONE) -> torch.device:
    """Where second moments lie: where everything is computed, or, where they are too large for it, on the host.

    Args:
        plan: resolved.
        room: bytes that are free on the plan's device; by default it is asked.
        ranks: processes that add their second moments up, so all on the host or none.
    """
    fits = all(ranks.gather(_moments_fit(plan, room)))
    return plan.device if fits else torch.device("cpu")


def _moments_fit(plan: Plan, room: int | None) -> bool:
    if plan.device.type != "cuda" or plan.config.method != "gptq":
        return True
    free = torch.cuda.mem_get_info(plan.device)[0] if room is None else room
    # Gradients of the whole model come before and its refinement after: neither keeps second moments.
    refine, gptq = replace(plan.config.refine, model_steps=0), replace(plan.config.gptq, gradient_tokens=0)
    blocks = plan._replace(config=replace(plan.config, refine=refine, gptq=gptq))
    return predict(blocks, Rates(1, 1, 1, 1)).peak <= SHARE_OF_GPU * free


def describe_prediction(prediction: Prediction) -> str:
    """As lines of text, for ``ptq plan``."""
    lines = [f"memory     {_gigabytes(prediction.peak)} at the peak of the solve: {_parts(prediction.memory)}"]
    if prediction.host:
        lines.append(f"host       {_gigabytes(sum(prediction.host.values()))} at the peak: {_parts(prediction.host)}")
    if prediction.evaluation:
        needed = _gigabytes(sum(prediction.evaluation.values()))
        lines.append(f"evaluation {needed} at the peak, after the solve: {_parts(prediction.evaluation)}")
    lines.append(f"disk       {_gigabytes(sum(prediction.disk.values()))} at the peak: {_parts(prediction.disk)}")
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in prediction.seconds.items())
    lines.append(f"time       about {_duration(sum(prediction.seconds.values()))} for the solve: {stages}")
    return "\n".join(lines)


def free_disk(output: Path) -> int:
    """Bytes that a run may have on the disk: what is free there, and what an unfinished run has already."""
    existing = next(parent for parent in output.parents if parent.is_dir())
    begun = sum(file.stat().st_size for file in place_of(output).path.rglob("*") if file.is_file())
    return shutil.disk_usage(existing).free + begun


def require_disk(prediction: Prediction, config: RunConfig) -> None:
    """Raise ConfigError where a run cannot fit on the disk of its output."""
    if short := missing_disk(prediction, config):
        raise ConfigError(f"{short}: free some space, or choose another `output`")


def missing_disk(prediction: Prediction, config: RunConfig) -> str:
    """What is needed and what is free where the disk of a run's output is too small for it; otherwise nothing."""
    output = output_path(Path(config.output))
    needed, free = sum(prediction.disk.values()), free_disk(output)
    if needed <= free:
        return ""
    return f"the run needs {_gigabytes(needed)} on the disk of {output} at its peak, {_gigabytes(free)} are free"


def compared(prediction: Prediction, memory: int, seconds: float) -> dict[str, dict[str, float]]:
    """Predicted against actual, for the report, and what the predicted seconds are made of."""
    stages = {name: float(f"{each:.3g}") for name, each in prediction.seconds.items()}
    return {
        "memory": {"predicted": prediction.peak, "actual": memory},
        "seconds": {"predicted": float(f"{sum(stages.values()):.3g}"), "actual": round(seconds, 2)},
        "stages": stages,
    }


def _hidden_bytes(plan: Plan) -> int:
    calibrates = plan.config.method != "rtn"
    return tokens_of(plan) * width(plan) * plan.dtype.itemsize if calibrates else 0


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
