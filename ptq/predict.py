"""What a run will need, from the shapes of a model alone: memory, disk and time, by stage.

Memory is anonymous memory (maps of files do not count: the system takes them back when it needs to). Time is a count of
floating-point operations divided by a rate that is measured on the machine for a second; stages that do not multiply
large matrices reach a share of that rate only.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ptq.gptq.candidates import CHUNK_WEIGHTS
from ptq.journal import KEPT
from ptq.models.structure import linears
from ptq.plan import Plan, estimate_size

FLOAT = 4  # bytes of float32
# Matrices [K, K] alive while one Hessian is factorised and its correction applied: H, drift, permuted, flipped, factor,
# its inverse, correction.
SQUARES = 7
COPIES = 4  # of the weights that several candidates are solved for together: stacked, in order, their values, codes
WEIGHTS = 7  # float32 matrices [N, K] alive while one weight is solved for: the weight, target, errors, candidates
# Share of the rate of a large matrix product that a stage reaches.
FORWARD, HESSIAN, FACTOR, COLUMNS = 0.6, 0.8, 0.25, 0.05
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


class _Block(NamedTuple):
    """The block that needs most."""

    parameters: int  # bytes
    weights: list[tuple[int, int]]  # (N, K) of the Linears to be quantized, in order
    groups: list[int]  # K of every input they read
    linear: int  # parameters of all Linears


def measure_rates(device: torch.device, directory: Path) -> Rates:
    """Time a matrix product and a write of 8 MiB; ``directory`` must exist."""
    a = torch.randn(1024, 1024, device=device)
    done, started = 0, time.perf_counter()
    while done < 2 or time.perf_counter() - started < 0.05:
        float((a @ a)[0, 0])
        done += 1
    operations = done * 2 * 1024**3 / (time.perf_counter() - started)
    data = bytes(8 * 1024**2)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Rates(operations, len(data) / (time.perf_counter() - started))


def predict(plan: Plan, rates: Rates, base: int = 0) -> Prediction:
    """What the run of a plan will need.

    Args:
        plan: resolved; no weight is read.
        rates: of the machine.
        base: bytes that the process holds before it starts.
    """
    block, outer = _largest_block(plan), _outer_bytes(plan)
    hidden = _hidden_bytes(plan)
    streams = 2 if _twin(plan) else 1
    kept_in_memory = hidden * streams if plan.config.calibration.offload == "memory" else 0
    work = _work_bytes(plan, block)
    entering = outer + block.parameters
    solving = block.parameters * (2 if _twin(plan) else 1) + sum(work.values())
    memory = {"process": base}
    if solving >= entering:
        memory |= {"block": block.parameters, "float block": block.parameters if _twin(plan) else 0, **work}
    else:
        memory |= {"block": block.parameters, "embeddings and head": outer}
    host: dict[str, int] = {}
    if plan.device.type == "cuda":
        host = {"process": base, "hidden states": kept_in_memory, "finished block": block.parameters}
        memory["process"] = 0
    else:
        memory["hidden states"] = kept_in_memory
    size = estimate_size(plan)
    shard = min(size.after, plan.config.max_shard_bytes)
    journal = hidden * streams * (KEPT + 1)
    disk = {"output": size.after, "shard in the making": shard, "journal of hidden states": journal}
    return Prediction({k: v for k, v in memory.items() if v}, host, disk, _seconds(plan, block, rates, disk))


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


def _largest_block(plan: Plan) -> _Block:
    found = []
    for index, module in plan.skeleton.get_submodule(plan.blocks).named_children():
        path = f"{plan.blocks}.{index}."
        names = [name for name, _ in linears(module)]
        weights = {name: plan.shapes[path + name] for name in names if path + name in plan.targets}
        # Linears beside each other that are as wide are taken to read the same input.
        groups = {(name.rpartition(".")[0], k): k for name, (_, k) in weights.items()}
        total = sum(n * k for n, k in (plan.shapes[path + name] for name in names))
        found.append(_Block(_bytes(module, plan), list(weights.values()), list(groups.values()), total))
    return max(found, key=lambda block: (block.parameters, len(block.weights)))


def _bytes(module: nn.Module, plan: Plan) -> int:
    return sum(p.numel() for p in module.parameters()) * plan.dtype.itemsize


def _outer_bytes(plan: Plan) -> int:
    return _bytes(plan.skeleton, plan) - _bytes(plan.skeleton.get_submodule(plan.blocks), plan)


def _twin(plan: Plan) -> bool:
    return plan.config.follows_float


def _tokens(plan: Plan) -> int:
    return plan.config.calibration.samples * plan.config.calibration.sequence_length if plan.config.calibrates else 0


def _width(plan: Plan) -> int:
    return int(plan.hf_config.get_text_config().hidden_size)


def _hidden_bytes(plan: Plan) -> int:
    calibrates = plan.config.method != "rtn"
    return _tokens(plan) * _width(plan) * plan.dtype.itemsize if calibrates else 0


def _work_bytes(plan: Plan, block: _Block) -> dict[str, int]:
    """Beside the weights of a block: Hessians, one weight being solved for, activations of one batch."""
    if not block.weights:
        return {}
    widest = max(k for _, k in block.weights)
    largest = max(n * k for n, k in block.weights)
    weight = WEIGHTS * FLOAT * largest
    if plan.config.method == "gptq":
        weight += COPIES * FLOAT * min(plan.config.gptq.candidates * largest, CHUNK_WEIGHTS)
    if plan.config.method == "rtn":
        return {"solver": weight}
    calibration = plan.config.calibration
    batch = min(calibration.batch_size, calibration.samples) * calibration.sequence_length
    activations = batch * (6 * _width(plan) + 4 * widest) * plan.dtype.itemsize + min(batch, 8192) * widest * FLOAT
    if plan.config.method == "gptq":
        return {"Hessians": SQUARES * FLOAT * widest**2, "solver": weight, "activations": activations}
    copies = 2 * block.parameters * FLOAT // plan.dtype.itemsize
    moments = FLOAT * sum(k * k for k in block.groups) + 2 * FLOAT * widest**2
    return {"Hessians": moments, "float32 block": copies, "solver": weight, "activations": activations}


def _seconds(plan: Plan, block: _Block, rates: Rates, disk: Mapping[str, int]) -> dict[str, float]:
    blocks = len(list(plan.skeleton.get_submodule(plan.blocks).children()))
    tokens, method = (_tokens(plan) if plan.config.method != "rtn" else 0), plan.config.method
    streams = 2 if _twin(plan) else 1
    # A pass up to each group in turn: on average half of the block, and once more to its end.
    passes = (len(block.groups) / 2 + 1 if method == "gptq" else 2) * streams
    length = plan.config.calibration.sequence_length
    forward = passes * 2 * tokens * (block.linear + 2 * length * _width(plan))
    hessian = sum(2 * tokens * k * k * streams for k in block.groups)
    factor = sum(k**3 * (2 / 3 + (4 if _twin(plan) else 0)) for k in block.groups) if method == "gptq" else 0.0
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


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
