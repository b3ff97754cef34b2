"""A large model on a small machine: ``ptq quantize`` on a random checkpoint, watched from outside.

``python benchmarks/random_model.py MODEL && python benchmarks/big.py MODEL OUTPUT [--method gptq] [--samples 8]
[--length 256] [--json FILE]``: default settings. Anonymous memory is read every 20 ms, and processor time at every line
the run prints, for on a shared machine only that says what a stage costs. Then the output is loaded and generates. A
run that was cut short goes on; then memory and times are those of its last part.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, Python looks beside this file only

from benchmarks.memory import TEXT

PROMPT = "It was a bright cold day"


class Watched:
    """A subprocess, its anonymous memory, and the processor time it had used at each line of its standard error."""

    def __init__(self, command: Sequence[str]) -> None:
        self.peak = 0
        self.lines: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if ": " in line and " s, " in line:
                spent = {"seconds": round(time.perf_counter() - self._started, 1), "cpu_seconds": self._cpu()}
                self.lines.append({"line": line.strip(), **spent})
            print(line, end="", file=sys.stderr, flush=True)
        assert self._process.stdout is not None
        self.output = self._process.stdout.read()
        if self._process.wait():
            raise SystemExit(f"{' '.join(command)} ended with {self._process.returncode}")
        thread.join()

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def _watch(self) -> None:
        while self._process.poll() is None:
            try:
                status = Path(f"/proc/{self._process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)


def configuration(options: argparse.Namespace) -> Path:
    """Everything by default but the method and the size of the calibration text."""
    from ptq.config import CalibrationConfig, DatasetConfig, RunConfig, dump

    text = DatasetConfig(files=(str(TEXT),))
    calibration = CalibrationConfig(dataset=text, samples=options.samples, sequence_length=options.length)
    config = RunConfig(model=str(options.model), output=str(options.output), method=options.method, device="cpu",
                       calibration=calibration)  # fmt: skip
    file = options.output.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump(config), encoding="utf-8")
    return file


def generate(folder: str, tokens: int) -> None:
    """Load a checkpoint and generate; a line of JSON."""
    from transformers import AutoTokenizer

    import ptq

    started = time.perf_counter()
    model = ptq.load(folder)
    loaded = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    new = found[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(new) == tokens
    assert len(set(new)) > 1, "the same token over and over"
    print(json.dumps({"load_seconds": round(loaded - started, 1), "tokens": new,
                      "generate_seconds": round(time.perf_counter() - loaded, 1)}))  # fmt: skip


def main() -> None:
    """Quantize, load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="as benchmarks/random_model.py writes it")
    parser.add_argument("output", type=Path, help="directory of the packed checkpoint")
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8, help="to generate")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        generate(str(options.output), options.tokens)
        return
    run = Watched([sys.executable, "-m", "ptq", "quantize", "--config", str(configuration(options))])
    report = json.loads((options.output / "report.json").read_text(encoding="utf-8"))
    rows = report["modules"].values()
    paths, tokens = [str(options.model), str(options.output)], str(options.tokens)
    use = Watched([sys.executable, __file__, *paths, "--generate", "--tokens", tokens])
    document = {
        "layers": json.loads((options.model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"],
        "method": options.method,
        "samples": options.samples,
        "length": options.length,
        "threads": report["hardware"]["threads"],
        "peak_anonymous_bytes": run.peak,
        "prediction": report.get("prediction"),
        "size": report["size"],
        "seconds": report["seconds"],
        "resumed": report.get("resumed"),
        "solve_seconds_of_modules": round(sum(row["seconds"] for row in rows), 1),
        "loss_to_rounding": sum(row["loss_to_rounding"] for row in rows) / len(rows),
        "rescues": sum(bool(row["rescues"]) for row in rows),
        "lines": run.lines,
        "use": {**json.loads(use.output.splitlines()[-1]), "peak_anonymous_bytes": use.peak},
    }
    print(f"{run.peak / 1e9:.2f} GB of anonymous memory at the peak of the run; {document['use']}")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
