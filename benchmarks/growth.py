"""How the time of a run grows with a model's depth and with the calibration tokens: linearly, or the plot shows it.

``python benchmarks/growth.py [--depths 2 4 8 12 16] [--samples 16 32 64 96 128] [--width 256] [--json FILE]
[--svg FILE]``: random models, default settings, each run in a process of its own; processor seconds of the whole run
without the start of Python. Prints how far the points lie from a straight line and draws both.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, Python looks beside this file only

from benchmarks.memory import TEXT, random_model
from ptq.page import Series, chart

LENGTH, DEPTH, SAMPLES = 256, 4, 32
STYLE = """svg { background: #fff } text { fill: #60656b; font: 12px sans-serif } .grid { stroke: #d5d8dc }
text.label { fill: #1b1b1b } polyline { fill: none; stroke-width: 1.7 } svg { --c0: #0b5fa5; --c1: #c4500b }"""


def seconds(parent: Path, output: Path, samples: int) -> float:
    """Of the processor, for one run in this process."""
    import io

    from ptq.config import CalibrationConfig, DatasetConfig, RunConfig
    from ptq.pipeline import quantize
    from ptq.progress import Progress

    text = DatasetConfig(files=(str(TEXT),))
    calibration = CalibrationConfig(dataset=text, samples=samples, sequence_length=LENGTH)
    config = RunConfig(model=str(parent), output=str(output), method="gptq", device="cpu", calibration=calibration)
    started = time.process_time()
    quantize(config, progress=Progress(io.StringIO()))
    return time.process_time() - started


def measured(parent: Path, samples: int, repeats: int) -> float:
    """The least of several runs, each in a process."""
    found = []
    for index in range(repeats):
        output = parent.with_name(f"{parent.name}-{samples}-{index}")
        command = [sys.executable, __file__, "--one", str(parent), str(output), str(samples)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        shutil.rmtree(output)  # both series have a point of this size
        found.append(float(done.stdout.splitlines()[-1]))
    return min(found)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Start and slope of the line of least squares."""
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    slope = (n * sum(x * y for x, y in points) - sx * sy) / (n * sum(x * x for x, _ in points) - sx * sx)
    return (sy - slope * sx) / n, slope


def drawn(growth: dict[str, list[tuple[float, float]]]) -> str:
    """Both as one SVG file: time against what grows, as multiples of its smallest value."""
    series = []
    for name, points in growth.items():
        first = points[0][0]
        series.append(Series(name, [(x / first, y) for x, y in points], label=name))
    figure = chart(series, x="times the smallest", y="processor seconds")
    found = re.search(r"<svg.*?</svg>", figure, re.DOTALL)
    assert found is not None
    opening = '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="320" '
    return found[0].replace("<svg ", opening, 1).replace(">", f"><style>{STYLE}</style>", 1) + "\n"


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 12, 16])
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 32, 64, 96, 128], help="of 256 tokens")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(seconds(Path(options.one[0]), Path(options.one[1]), int(options.one[2])))
        return
    depth, tokens = f"blocks, from {options.depths[0]}", f"tokens, from {options.samples[0] * LENGTH}"
    growth: dict[str, list[tuple[float, float]]] = {depth: [], tokens: []}
    with tempfile.TemporaryDirectory() as name:
        parents = {d: random_model(Path(name) / str(d), d, options.width) for d in {*options.depths, DEPTH}}
        for blocks in options.depths:
            growth[depth].append((blocks, measured(parents[blocks], SAMPLES, options.repeats)))
        for samples in options.samples:
            growth[tokens].append((samples * LENGTH, measured(parents[DEPTH], samples, options.repeats)))
    for what, points in growth.items():
        start, slope = line(points)
        worst = max(abs(y / (start + slope * x) - 1) for x, y in points)
        print(f"{what}: {points}; {start:.2f} + {slope:.3g} each, at most {worst:.1%} off the line")
    if options.json:
        document = {"width": options.width, "depth": DEPTH, "samples": SAMPLES, "length": LENGTH, "growth": growth}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        options.svg.parent.mkdir(parents=True, exist_ok=True)
        options.svg.write_text(drawn(growth), encoding="utf-8")


if __name__ == "__main__":
    main()
