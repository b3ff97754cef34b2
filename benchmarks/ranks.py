"""How much faster several processes of one thread quantize a model than one process of one thread.

``python benchmarks/ranks.py [--processes 2] [--width 512] [--depth 2] [--samples 128] [--repeats 3] [--json FILE]``: a
random model is as good as another here. Needs as many idle cores as processes. The runs take turns; of each kind the
fastest counts, once for the solving of all blocks and once for the whole run, without the start of Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, Python looks beside this file only

from benchmarks.memory import ROOT, TEXT, random_model

LENGTH = 256


def settings(folder: Path, samples: int) -> Path:
    """A run of GPTQ with its options as they are when nothing is said."""
    from ptq.config import CalibrationConfig, DatasetConfig, RunConfig, dump

    text = DatasetConfig(files=(str(TEXT),))
    calibration = CalibrationConfig(dataset=text, samples=samples, sequence_length=LENGTH, batch_size=4)
    config = RunConfig(
        model=str(folder / "parent"), output=str(folder / "out"), method="gptq", device="cpu", calibration=calibration
    )  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(dump(config), encoding="utf-8")
    return file


def measured(file: Path, output: Path, processes: int) -> dict[str, float]:
    """Seconds of one run, as its report says."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *launcher, "-m", "ptq.gptq", "--config", str(file), "--overwrite"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["hardware"]["threads"] == 1
    assert report["hardware"]["processes"] == processes
    return {"solve": report["seconds"]["solve"], "total": report["seconds"]["total"]}


def main() -> None:
    """Print a line a run, then how many times as fast the processes were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {1: [], options.processes: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "parent", options.depth, options.width)
        file = settings(folder, options.samples)
        for _ in range(options.repeats):
            for processes, rows in runs.items():
                rows.append(measured(file, folder / "out", processes))
                print(f"{processes} processes: {rows[-1]['solve']:.2f} s to solve, {rows[-1]['total']:.2f} s in all")
    best = {p: {key: min(row[key] for row in rows) for key in rows[0]} for p, rows in runs.items()}
    faster = {key: round(best[1][key] / best[options.processes][key], 3) for key in best[1]}
    print(f"{options.processes} processes are {faster['solve']:.2f} times as fast ({faster['total']:.2f} in all)")
    if options.json:
        row = {"width": options.width, "depth": options.depth, "samples": options.samples, "length": LENGTH,
               "cores": os.cpu_count(), "runs": runs, "times_as_fast": faster}  # fmt: skip
        Path(options.json).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
