"""What a run will need, from the shapes of a model alone: memory, disk and time, by stage.

Memory is anonymous memory (maps of files do not count: the system takes them back when it needs to). Time is a count of
floating-point operations divided by a rate that is measured on the machine for a second; stages that do not multiply
large matrices reach a share of that rate only.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ptq.journal import KEPT
from ptq.plan import Plan, estimate_size
from ptq.predict_memory import Block, Stage, block_work, largest_block, outer_bytes, width

# Share of the rate of a large matrix product that a stage reaches.
FORWARD, HESSIAN, FACTOR, COLUMNS = 0.6, 0.8, 0.5, 0.05
# Of a GPU's free memory: the rest goes to fragments and to what libraries allocate.
SHARE_OF_GPU = 0.9
SEARCH = 60  # operations on a weight for every candidate scale that is tried for it
CANDIDATES = 40


class Rates(NamedTuple):
    """What a machine does in a second: float32 operations in a matrix product, bytes to and from the disk."""

    operations: float
    disk: float


class Prediction(NamedTuple):
    """Bytes and seconds."""

    memory: dict[str, int]  # parts of the peak, on the device that solves
    host: dict[str, int]  # parts of the peak beside a GPU; empty without one
    disk: dict[str, int]
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes on the device that solves."""
        return sum(self.memory.values())


def measure_rates(device: torch.device, directory: Path) -> Rates:
    """Time a matrix product and a write of 8 MiB, or of half of what is free; ``directory`` must exist."""
    a = torch.randn(1024, 1024, device=device)
    done, started = 0, time.perf_counter()
    while done < 2 or time.perf_counter() - started < 0.05:
        float((a @ a)[0, 0])
        done += 1
    operations = done * 2 * 1024**3 / (time.perf_counter() - started)
    data = bytes(max(1, min(8 * 1024**2, shutil.disk_usage(directory).free // 2)))
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Rates(operations, len(data) / (time.perf_counter() - started))


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
    if block.parameters * streams + sum(work.values()) >= outer + block.parameters:
        memory |= {"block": block.parameters, "float block": block.parameters * (streams - 1), **work}
    else:
        memory |= {"block": block.parameters, "embeddings and head": outer}
    if plan.device.type == "cuda":
        host |= {"process": base, "hidden states": kept_in_memory, "finished block": block.parameters}
        memory["process"] = 0
    else:
        memory["hidden states"] = kept_in_memory
    size = estimate_size(plan)
    shard = min(size.after, plan.config.max_shard_bytes)
    journal = hidden * streams * (KEPT + 1)
    disk = {"output": size.after, "shard in the making": shard, "journal of hidden states": journal}
    return Prediction({k: v for k, v in memory.items() if v}, host, disk, _seconds(plan, block, rates, disk))


def home_of(plan: Plan, room: int | None = None) -> torch.device:
    """Where second moments lie: where everything is computed, or, where they are too large for it, on the host.

    Args:
        plan: resolved.
        room: bytes that are free on the plan's device; by default it is asked.
    """
    if plan.device.type != "cuda" or plan.config.method != "gptq":
        return plan.device
    free = torch.cuda.mem_get_info(plan.device)[0] if room is None else room
    fits = predict(plan, Rates(1, 1)).peak <= SHARE_OF_GPU * free
    return plan.device if fits else torch.device("cpu")


def describe_prediction(prediction: Prediction) -> str:
    """As lines of text, for ``ptq plan``."""
    lines = [f"memory     {_gigabytes(prediction.peak)} at the peak: {_parts(prediction.memory)}"]
    if prediction.host:
        lines.append(f"host       {_gigabytes(sum(prediction.host.values()))} at the peak: {_parts(prediction.host)}")
    lines.append(f"disk       {_gigabytes(sum(prediction.disk.values()))} at the peak: {_parts(prediction.disk)}")
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in prediction.seconds.items())
    lines.append(f"time       about {_duration(sum(prediction.seconds.values()))}: {stages}")
    return "\n".join(lines)


def compared(prediction: Prediction, memory: int, seconds: float) -> dict[str, dict[str, float]]:
    """Predicted against actual, for the report."""
    return {
        "memory": {"predicted": prediction.peak, "actual": memory},
        "seconds": {"predicted": float(f"{sum(prediction.seconds.values()):.3g}"), "actual": round(seconds, 2)},
    }


def _tokens(plan: Plan) -> int:
    return plan.config.calibration.samples * plan.config.calibration.sequence_length if plan.config.calibrates else 0


def _hidden_bytes(plan: Plan) -> int:
    calibrates = plan.config.method != "rtn"
    return _tokens(plan) * width(plan) * plan.dtype.itemsize if calibrates else 0


def _seconds(plan: Plan, block: Block, rates: Rates, disk: Mapping[str, int]) -> dict[str, float]:
    blocks = len(list(plan.skeleton.get_submodule(plan.blocks).children()))
    tokens, method = (_tokens(plan) if plan.config.method != "rtn" else 0), plan.config.method
    streams = 2 if plan.config.follows_float else 1
    # A pass up to each group in turn: on average half of the block, and once more to its end.
    passes = (len(block.stages) / 2 + 1 if method == "gptq" else 2) * streams
    length = plan.config.calibration.sequence_length
    forward = passes * 2 * tokens * (block.linear + 2 * length * width(plan))
    hessian = sum(2 * tokens * s.features**2 * (streams if s.inputs == 1 else 1) for s in block.stages)
    factor = sum(_factor(stage, streams > 1) for stage in block.stages) if method == "gptq" else 0.0
    solving = method == "gptq" or (method == "awq" and plan.config.awq.codes == "gptq")
    if solving:
        rounds = plan.config.gptq.candidates + 2 * plan.config.gptq.sweeps
    else:
        rounds = plan.config.awq.grid if method == "awq" else 0
    columns = sum(n * k * k for n, k in block.weights) * rounds
    search = sum(n * k for n, k in block.weights) * SEARCH * CANDIDATES
    operations = rates.operations
    written = disk["output"] * 2 + blocks * disk["journal of hidden states"] / (KEPT + 1)
    return {
        "forward passes": blocks * forward / (FORWARD * operations),
        "Hessians": blocks * hessian / (HESSIAN * operations),
        "factorizations": blocks * factor / (FACTOR * operations),
        "codes": blocks * (columns + search) / (COLUMNS * operations),
        "disk": written / rates.disk,
    }


def _factor(stage: Stage, drifts: bool) -> float:
    """Operations for the factors of a stage's inputs and the correction of its weights."""
    k, n = stage.features, sum(stage.rows)
    corrected = 2 * k * k * (min(n, k) + n) if drifts and stage.inputs == 1 else 0
    return stage.inputs * 2 / 3 * k**3 + corrected


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
