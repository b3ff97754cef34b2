"""Checkpoints written by the peers, loaded by ptq; and ours, loaded by the peers.

    python -m benchmarks.foreign

Each checkpoint's logits are compared with those of a float32 model that holds the weights as a neutral reader
(`benchmarks.quality.decode`) takes them from the file. Results go to benchmarks/results/foreign.json; checkpoints that
are there already are not made again.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.foreign.cells import READ, WRITTEN, Cell
from benchmarks.foreign.parents import make
from benchmarks.foreign.reading import compare_ours, compare_theirs
from benchmarks.foreign.tools import HERE, FailedError, drive
from benchmarks.patterns import pattern
from benchmarks.quality.environments import ROOT

PARENT = ROOT / "examples/tiny-llama"
RESULTS = ROOT / "benchmarks/results/foreign.json"
SAMPLES, LENGTH = 16, 128


def main() -> None:
    """Run what is asked for and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.foreign", description=(__doc__ or "").split("\n\n")[0])
    only = "only cells whose tool and label have a match"
    parser.add_argument("--only", type=pattern, default="", metavar="REGEX", help=only)
    parser.add_argument("--write", action="store_true", help="only write the peers' checkpoints")
    options = parser.parse_args()
    written = {f"{cell.tool} | {cell.label}": cell for cell in WRITTEN}
    read = {} if options.write else {f"{row[0].label} read by {row[1]}": row for row in READ}
    known = [*written, *read]
    chosen = [key for key in known if re.search(options.only, key)]
    if not chosen:
        parser.error(f"--only must fit one of {len(known)} cells, as {known[0]!r}; {options.only!r} fits none")
    torch.set_num_threads(1)
    for key in chosen:
        place = HERE / ".work" / re.sub(r"\W+", "-", key)
        if key in read:
            ours, tool, settings = read[key]
            parent = make(ours.parent, PARENT, HERE / ".work" / ours.parent) if ours.parent else PARENT
            try:
                entry = compare_ours(parent, ours, tool, dict(settings), place)
            except FailedError as error:
                entry = {"error": str(error)}
            _store("ours", key, {"settings": dict(ours.settings), **entry})
            continue
        entry = {"settings": dict(written[key].settings)}
        try:
            entry["versions"] = _write(written[key], place)
            if options.write:
                continue
            entry |= compare_theirs(place / "checkpoint")
        except FailedError as error:
            entry["error"] = str(error)
        _store("theirs", key, entry)


def _write(cell: Cell, place: Path) -> dict[str, str]:
    done = place / "versions.json"
    if not done.is_file():
        place.mkdir(parents=True, exist_ok=True)
        job = {"parent": str(PARENT), "output": str(place / "checkpoint"), "ids": _ids(), "method": cell.method,
               "settings": dict(cell.settings)}  # fmt: skip
        done.write_text(json.dumps(drive(cell.tool, job, place)))
    versions: dict[str, str] = json.loads(done.read_text())
    return versions


def _ids() -> list[list[int]]:
    from transformers import AutoTokenizer

    text = (ROOT / "examples/text/calibration.txt").read_text()[: SAMPLES * LENGTH * 8]
    ids = AutoTokenizer.from_pretrained(PARENT)(text)["input_ids"]
    return [ids[start : start + LENGTH] for start in range(0, SAMPLES * LENGTH, LENGTH)]


def _store(kind: str, key: str, entry: dict[str, Any]) -> None:
    document = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    document.setdefault(kind, {})[key] = entry
    RESULTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(f"{key}: {entry.get('error') or entry.get('differences')}", flush=True)


if __name__ == "__main__":
    main()
