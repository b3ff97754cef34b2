"""Quantizes the same parents with the same calibration tokens by ptq and its peers, and compares what comes out.

    python -m benchmarks.quality --quick

Finished checkpoints are in benchmarks/results/quality.json and are not made again; an interrupted run goes on where it
was. Run it on a quiet machine when times matter.
"""

import argparse
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.patterns import pattern
from benchmarks.quality.calibration import write_ids
from benchmarks.quality.cells import CELLS, OURS, QUICK_CELLS, ROWS, SEEDS, Cell, Row
from benchmarks.quality.decode import Dense, read_dense, read_tensors
from benchmarks.quality.environments import HERE, ROOT
from benchmarks.quality.evaluation import evaluate
from benchmarks.quality.facts import weights_hash
from benchmarks.quality.quantize import FailedError, Task, largest_difference, quantize
from benchmarks.quality.store import Store
from benchmarks.quality.table import markdown

WORK = HERE / ".work"


def main() -> None:
    """Run what is missing, then write the tables."""
    options = _options()
    results = Store()
    if not options.table:
        torch.set_num_threads(options.threads)
        for parent in options.parent:
            _parent(parent, results, options)
    text = markdown(results.document)
    results.file.with_suffix(".md").write_text("# Quality\n\nWritten by `python -m benchmarks.quality`.\n\n" + text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--parent", type=Path, action="append", metavar="DIR", help="float model; may be repeated [examples/tiny-llama]"
    )
    parser.add_argument("--quick", action="store_true", help="one seed; 4-bit and 3-bit g128 symmetric")
    names = "only checkpoints whose name (as in the results) has a match, as in '3-bit.*ptq GPTQ'"
    parser.add_argument("--only", type=pattern, default="", metavar="REGEX", help=names)
    parser.add_argument("--again", action="store_true", help="make checkpoints again that have a result")
    parser.add_argument("--table", action="store_true", help="only write the tables anew")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of every tool (default: the cores, %(default)s)")
    options = parser.parse_args()
    options.parent = [parent.resolve() for parent in options.parent or [ROOT / "examples/tiny-llama"]]
    if not options.table:
        known = [key for parent in options.parent for cell, seed in _runs(options) for key in _rows(parent, cell, seed)]
        if not any(re.search(options.only, key) for key in known):
            parser.error(f"--only must fit one of {len(known)} names, as {known[0]!r}; {options.only!r} fits none")
    return options


def _runs(options: argparse.Namespace) -> list[tuple[Cell, int]]:
    """Cells and calibration seeds."""
    cells, seeds = (QUICK_CELLS, SEEDS[:1]) if options.quick else (CELLS, SEEDS)
    return [(cell, seed) for cell in cells for seed in seeds]


def _rows(parent: Path, cell: Cell, seed: int) -> dict[str, Row]:
    """The rows that a seed makes, by their names in the results."""
    rows = [row for row in ROWS if row.seeded or seed == SEEDS[0]]
    return {f"{parent.name} | {cell.name} | {row.tool} {row.label} | seed {seed}": row for row in rows}


def _parent(parent: Path, results: Store, options: argparse.Namespace) -> None:
    known = results.document["parents"].get(parent.name)
    if known and known["weights"] != weights_hash(parent):
        raise SystemExit(f"{parent.name} in {results.file} has other weights than {parent}: rename one of the two")
    for cell, seed in _runs(options):
        tasks = list(_tasks(parent, cell, seed, options.only))
        missing = [task for task in tasks if options.again or not results.has(task.key)]
        if options.again:
            for task in missing:
                shutil.rmtree(task.place, ignore_errors=True)
        _compare(parent, missing, results, options.threads)


def _tasks(parent: Path, cell: Cell, seed: int, only: str) -> Iterator[Task]:
    ids = None
    for key, row in _rows(parent, cell, seed).items():
        if re.search(only, key):
            ids = ids or write_ids(parent, seed, WORK / f"{parent.name}-{seed}.json")
            yield Task(key, parent, cell, row, seed, ids, WORK / re.sub(r"\W+", "-", key))


def _compare(parent: Path, tasks: Sequence[Task], results: Store, threads: int) -> None:
    """Make the checkpoints, then read them all and score them in one pass over the texts."""
    made: list[tuple[Task, dict[str, Any], Dense]] = []
    tensors = read_tensors(parent)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for task in tasks:
        entry = {
            "parent": parent.name, "cell": task.cell.name, "tool": task.row.tool, "label": task.row.label,
            "seed": task.seed, "calibration": task.ids.hash,
        }  # fmt: skip
        print(f"{task.key} ... ", end="", flush=True)
        try:
            entry |= quantize(task, threads)
        except FailedError as error:
            print(f"failed: {error}")
            results.add("checkpoints", task.key, entry | {"error": str(error)})
            continue
        dense = read_dense(task.checkpoint, shapes)
        entry |= {"bits_per_weight": dense.bits_per_weight, "reader": _reader(task, dense, threads)}
        made.append((task, entry, dense))
        print(f"{entry['seconds']:.1f} s, {entry['memory_peak'] / 1e6:.0f} MB", flush=True)
    if not made:
        return
    models = {task.key: dense.tensors for task, _, dense in made}
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    metrics = evaluate(parent, {"parent": floats, **models}, ROOT / "examples/text")
    results.add("parents", parent.name, _facts(parent, tensors, metrics["parent"]))
    for task, entry, _ in made:
        results.add("checkpoints", task.key, entry | {"metrics": metrics[task.key]})
        print(f"{task.key}: KL {metrics[task.key]['both']['kl']:.5f}", flush=True)
        shutil.rmtree(task.place)


def _facts(parent: Path, tensors: dict[str, torch.Tensor], metrics: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    return {
        "architecture": AutoConfig.from_pretrained(parent).architectures[0],
        "parameters": sum(t.numel() for t in tensors.values()),
        "weights": weights_hash(parent),
        "metrics": metrics,
    }


def _reader(task: Task, dense: Dense, threads: int) -> dict[str, Any]:
    """The neutral reader against the tool's own, on the first, the middle and the last quantized Linear."""
    names = dense.quantized
    modules = sorted({names[0], names[len(names) // 2], names[-1]})
    try:
        if task.row.tool == OURS:
            return {"difference": _own_difference(task, dense, modules)}
        return {"difference": largest_difference(task, dense.tensors, modules, threads)}
    except FailedError as error:
        return {"unchecked": str(error)}


def _own_difference(task: Task, dense: Dense, modules: Sequence[str]) -> float:
    """As for a peer, with the codecs that ptq loads checkpoints with."""
    import ptq
    from ptq.nn.linear import QuantLinear

    model = ptq.load(task.checkpoint, device="cpu", impl="reference", dtype="float32")
    worst = 0.0
    for module in modules:
        linear = model.get_submodule(module)
        assert isinstance(linear, QuantLinear)
        own = dense.tensors[f"{module}.weight"]
        worst = max(worst, float((linear.dequantize().float() - own).abs().max() / own.abs().max()))
    return worst


if __name__ == "__main__":
    main()
