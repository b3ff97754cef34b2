"""Memory of the evaluation after a solve: ``python benchmarks/evaluation_memory.py MODEL [--json FILE]``.

MODEL is a directory, as ``benchmarks/random_model.py MODEL --layers 2`` writes one with the vocabulary of Llama 3. It
is rounded to nearest, for memory does not depend on the codes, and then compared as after GPTQ: the parent, its weights
rounded, the result. Anonymous memory at the peak is printed beside what ``ptq plan`` predicts.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "text" / "eval-novel.txt"


def measured(model: str, output: Path, tokens: int, window: int) -> dict[str, object]:
    """Of one evaluation, in this process."""
    from ptq.config import CalibrationConfig, DatasetConfig, EvaluationConfig, RunConfig
    from ptq.evaluation import evaluate_run
    from ptq.pipeline import quantize
    from ptq.plan import make_plan
    from ptq.predict_memory import evaluation_work
    from ptq.progress import Progress
    from ptq.report import PeakMemory, anonymous_bytes

    text = DatasetConfig(files=(str(TEXT),))
    config = RunConfig(model=model, output=str(output), method="rtn", device="cpu",
                       calibration=CalibrationConfig(dataset=text))  # fmt: skip
    quantize(config, progress=Progress(io.StringIO()))
    evaluation = EvaluationConfig(dataset=text, tokens=tokens, window=window, stride=window)
    plan = make_plan(replace(config, method="gptq", evaluation=evaluation))
    parts = {"process": anonymous_bytes(), **evaluation_work(plan)}
    started = time.perf_counter()
    with PeakMemory() as peak:
        found = evaluate_run(plan, output)
    return {"tokens": found["tokens"], "window": window, "predicted": sum(parts.values()), "parts": parts,
            "actual": peak.bytes, "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip


def main() -> None:
    """Measure in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.model, options.one, options.tokens, options.window)))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--tokens", str(options.tokens), "--window", str(options.window)]
        command = [sys.executable, __file__, options.model, "--one", f"{folder}/out", *sizes]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{found['tokens']} tokens, window {found['window']}: {found['actual'] / 1e9:.2f} GB at the peak, "
          f"{found['predicted'] / 1e9:.2f} GB predicted, {found['seconds']} s")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
