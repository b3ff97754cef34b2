"""Predicted against actual: ``python benchmarks/predictions.py [--json FILE]``.

Runs the demo's configuration by every method, each in a process of its own, and reads from its report the memory and
the time that were predicted before the first weight was read, and what the commits of the journal took of the run. On a
machine with nothing else on it: what else runs is not predicted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {
    "gptq, 4 bits": ["method=gptq"],
    "gptq, 3 bits": ["method=gptq", "bits=3"],
    "gptq, 4 bits, 16 sequences": ["method=gptq", "calibration.samples=16"],
    "gptq, 4 bits, asymmetric, groups of 32": ["method=gptq", "format=gptq_v2", "symmetric=false", "group_size=32"],
    "awq": ["method=awq", "format=awq", "symmetric=false"],
    "awq, then gptq": ["method=awq", "awq.codes=gptq"],
    "refined, 40 steps a block": ["method=gptq", "refine.steps=40"],
    "refined, 10 steps of the model": ["method=gptq", "refine.model_steps=10"],
    "rounding": ["method=rtn"],
}


def measured(changes: list[str]) -> dict[str, object]:
    """Of one run."""
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"output={folder}/out", "evaluation=null", *changes]
        command = [sys.executable, "-m", "ptq", "quantize", "--config", "demo.yaml"]
        command += [word for each in sets for word in ("--set", each)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads((Path(folder) / "out" / "report.json").read_text(encoding="utf-8"))
    return {**report["prediction"], "journal": report["journal"]["seconds"], "hardware": report["hardware"]}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    print(f"{'':40}  seconds predicted, taken         MB predicted, used      journal")
    for name, changes in RUNS.items():
        row = found[name] = measured(changes)
        seconds, memory = row["seconds"], row["memory"]
        print(
            f"{name:40}  {seconds['predicted']:8.1f} {seconds['actual']:8.1f} "
            f"{seconds['predicted'] / seconds['actual']:6.2f}  "
            f"{memory['predicted'] / 1e6:8.0f} {memory['actual'] / 1e6:8.0f} "
            f"{memory['predicted'] / memory['actual']:6.2f}  {100 * row['journal'] / seconds['actual']:5.1f} %",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
