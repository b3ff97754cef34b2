"""Times whole models of a few shapes: 4-bit against bfloat16 through `ptq.load` and `generate`, and against llama.cpp.

    python -m benchmarks.whole_model --shape llama-0.5b --threads 1 2 --llama-cpp ENVIRONMENT/bin/python

Weights are random; they are written once into benchmarks/whole_model/.work and kept. Every measurement is a process of
its own with pinned threads, and the rounds go through all of them in turn. Run it on a quiet machine.
"""

import argparse
import json
import os
from pathlib import Path

from benchmarks.quality.facts import commit, hardware
from benchmarks.whole_model.processes import Task, prepare, run
from benchmarks.whole_model.rows import LLAMA_CPP, ROWS, Row
from benchmarks.whole_model.shapes import SHAPES
from benchmarks.whole_model.table import Cell, markdown, summarise
from ptq.report import versions


def main() -> None:
    """Make the models, time them in rounds, write and print what was found."""
    options = _options()
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    rows = [row for row in rows if options.llama_cpp or row.kind != LLAMA_CPP]
    for row in rows:
        print(f"writing {options.shape}, {row.model}", flush=True)
        prepare(options.shape, row, options.llama_cpp)
    cells: dict[str, Cell] = {}
    document = {
        "shape": {"name": options.shape, **SHAPES[options.shape]._asdict()},
        "prompt": options.prompt,
        "new": options.new,
        "hardware": hardware(max(options.threads)),
        "versions": versions(),
        "commit": commit(),
        "cells": cells,
    }
    for number in range(options.rounds):
        for threads in options.threads:
            for row in rows:
                _measure(row, threads, number, options, cells)
                document["rows"] = summarise(cells)
                if options.json:
                    _write(options.json, document)
    print(markdown(summarise(cells), options.prompt))


def _measure(row: Row, threads: int, number: int, options: argparse.Namespace, cells: dict[str, Cell]) -> None:
    task = Task(options.shape, row, threads, options.prompt, options.new, options.repeats)
    cell = cells.setdefault(f"{row.name}, {threads} thread(s)", {"row": row.name, "threads": threads, "rounds": []})
    print(f"round {number + 1}, {row.name}, {threads} thread(s) ... ", end="", flush=True)
    load = round(os.getloadavg()[0], 1)
    found = run(task, options.llama_cpp)
    cell["rounds"].append({**found, "machine_load": load})
    if "error" in found:
        print(f"failed: {found['error']}", flush=True)
        return
    best = {key: min(each[key] for each in found["runs"]) for key in ("first_token", "token")}
    print(f"{best['first_token']:.3f} s to the first token, {1 / best['token']:.1f} tokens/s", flush=True)


def _write(file: Path, document: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(file)


def _options() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_model", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-0.5b", help="[%(default)s]")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="[%(default)s]")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="PYTHON", help="interpreter that has llama-cpp-python and gguf [leave it out]"
    )
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help=f"of {names}")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each row [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="timings in each process [%(default)s]")
    parser.add_argument("--prompt", type=int, default=512, help="tokens [%(default)s]")
    parser.add_argument("--new", type=int, default=64, help="tokens generated [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
