"""Checkpoints: ptq through its command line, each peer through its driver in its own environment."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.quality.calibration import BATCH, CONFIG, Ids, settings
from benchmarks.quality.cells import OURS, Cell, Row, format_of
from benchmarks.quality.environments import HERE, PEERS, ROOT, python_of
from benchmarks.quality.facts import commit, hardware

LONGEST = 3600  # seconds for one checkpoint


class Task(NamedTuple):
    """One checkpoint to make, its name in the results, and where."""

    key: str
    parent: Path
    cell: Cell
    row: Row
    seed: int
    ids: Ids
    place: Path  # directory of this checkpoint's files

    @property
    def checkpoint(self) -> Path:
        """The directory a tool writes."""
        return self.place / "checkpoint"


class FailedError(Exception):
    """A tool could not do what was asked; the message is the end of what it said."""


def quantize(task: Task, threads: int) -> dict[str, Any]:
    """Make a checkpoint, unless an interrupted run left it.

    Returns:
        ``seconds`` of the solve (without loading and saving the model), ``memory_before`` and ``memory_peak`` of
        resident memory during it in bytes, ``versions``, and when, at which commit and on what it ran.

    Raises:
        FailedError: the tool failed, or ran longer than an hour.
    """
    costs = task.place / "costs.json"
    if costs.is_file():
        found: dict[str, Any] = json.loads(costs.read_text())
        return found
    shutil.rmtree(task.place, ignore_errors=True)
    task.place.mkdir(parents=True)
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": commit(),
        "hardware": hardware(threads),
        **(_ours if task.row.tool == OURS else _peer)(task, threads),
    }
    costs.write_text(json.dumps(result))
    return result


def _ours(task: Task, threads: int) -> dict[str, Any]:
    cell = task.cell
    changes = {
        "model": task.parent,
        "output": task.checkpoint,
        "method": task.row.method,
        "bits": cell.bits,
        "group_size": cell.group_size,
        "symmetric": str(cell.symmetric).lower(),
        "format": format_of(cell),
        "device": "cpu",
        "evaluation": "null",
        **task.row.options,
    }
    arguments = [f"{key}={value}" for key, value in changes.items()] + settings(task.seed)
    command = [sys.executable, "-m", "ptq", "quantize", "--config", CONFIG]
    _run([*command, *(part for a in arguments for part in ("--set", a))], task, threads, {})
    report = json.loads((task.checkpoint / "report.json").read_text())
    drawn = report.get("calibration", {}).get("token_hash", task.ids.hash)
    if drawn != task.ids.hash:
        raise FailedError(f"ptq calibrated on tokens {drawn}, the peers on {task.ids.hash}")
    return {
        "seconds": report["seconds"]["solve"],
        "memory_before": report["memory"]["before_solve"],
        "memory_peak": report["memory"]["peak_of_solve"],
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"ptq": report["versions"]["ptq"]},
    }


def _peer(task: Task, threads: int) -> dict[str, Any]:
    report = task.place / "report.json"
    job = {
        "parent": str(task.parent),
        "output": str(task.checkpoint),
        "ids": str(task.ids.file),
        **task.cell._asdict(),
        "method": task.row.method,
        "options": dict(task.row.options),
        "seed": task.seed,
        "batch_size": BATCH,
        "report": str(report),
    }
    _drive(task, threads, job)
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def largest_difference(task: Task, dense: Mapping[str, torch.Tensor], modules: Sequence[str], threads: int) -> float:
    """How far a peer's own reader is from ours: the largest difference as a share of the module's largest weight.

    Raises:
        FailedError: the peer cannot read its checkpoint on this machine.
    """
    file = task.place / "dense.safetensors"
    job = {"output": str(task.checkpoint), "method": task.row.method, "modules": list(modules), "dense": str(file)}
    _drive(task, threads, job, "--read")
    theirs = load_file(file)
    worst = 0.0
    for module in modules:
        own = dense[f"{module}.weight"]
        worst = max(worst, float((theirs[module] - own).abs().max() / own.abs().max()))
    return worst


def _drive(task: Task, threads: int, job: Mapping[str, Any], *flags: str) -> None:
    file = task.place / f"job{''.join(flags)}.json"
    file.write_text(json.dumps(job))
    peer = PEERS[task.row.tool]
    driver = HERE / "drivers" / peer.driver
    _run([str(python_of(task.row.tool)), str(driver), str(file), *flags], task, threads, peer.variables)


def _run(command: Sequence[str], task: Task, threads: int, variables: Mapping[str, str]) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]) if task.row.tool == OURS else "",
        **variables,
    }
    log = task.place / "log.txt"
    with log.open("ab") as stream:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            raise FailedError(f"ran longer than {LONGEST} s") from None
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise FailedError(lines[-1][-300:] if lines else f"exit code {done.returncode}")
