"""The table of methods in the README: every row is one run of configs/demo.yaml with a few keys changed.

    python benchmarks/methods.py --json benchmarks/results/methods.json

Evaluation in float32, so that the rounding of bfloat16 activations does not blur the distance between models.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from ptq.config import EvaluationConfig, load_config
from ptq.evaluation import evaluate_checkpoint
from ptq.pipeline import quantize
from ptq.progress import Progress
from ptq.report import versions

ASYMMETRIC = ["symmetric=false", "format=compressed-tensors"]
PAPER = ["gptq.scales=range", "gptq.candidates=1", "gptq.sweeps=0", "gptq.correct_inputs=0"]
ROWS: dict[str, list[str]] = {
    "RTN, 4 bits": ["method=rtn"],
    "AWQ, 4 bits": ["method=awq"],
    "AWQ scales, GPTQ codes, 4 bits": ["method=awq", "awq.codes=gptq"],
    "GPTQ as in the paper, 4 bits": PAPER,
    "GPTQ, 4 bits": [],
    "RTN, 4 bits, asymmetric": ["method=rtn", *ASYMMETRIC],
    "AWQ, 4 bits, asymmetric": ["method=awq", *ASYMMETRIC],
    "GPTQ, 4 bits, asymmetric": ASYMMETRIC,
    "RTN, 3 bits": ["method=rtn", "bits=3"],
    "AWQ, 3 bits": ["method=awq", "bits=3"],
    "GPTQ, 3 bits": ["bits=3"],
    "GPTQ, 8 bits": ["bits=8"],
}
TOKENS = 49152


def measure(changes: list[str], parent: str, settings: EvaluationConfig) -> dict[str, float]:
    """Quantize with some keys changed and evaluate the checkpoint against its parent."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        config = load_config("demo.yaml", [f"output={output}", "evaluation=null", *changes])
        report = quantize(config, progress=Progress(open("/dev/null", "w")))  # noqa: SIM115
        found = evaluate_checkpoint(str(output), parent, settings, device="cpu", dtype="float32")
        return {
            "bits_per_weight": report.document["size"]["bits_per_weight"],
            **{f"parent_{key}": value for key, value in found["models"]["parent"].items()},
            **found["models"]["result"],
        }


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """The rows as a table."""
    lines = ["| | bits a weight | perplexity | KL to the parent | same top token |", "|---" * 5 + "|"]
    parent = next(iter(rows.values()))["parent_perplexity"]
    lines.append(f"| parent | 16 | {parent:.2f} | | |")
    for name, r in rows.items():
        quality = f"{r['perplexity']:.2f} | {r['kl']:.5f} | {r['top1']:.1%}"
        lines.append(f"| {name} | {r['bits_per_weight']:.2f} | {quality} |")
    return "\n".join(lines)


def main() -> None:
    """Run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    base = load_config("demo.yaml")
    assert base.evaluation is not None
    settings = EvaluationConfig(files=base.evaluation.files, tokens=TOKENS)
    rows = {}
    for name, changes in ROWS.items():
        rows[name] = measure(changes, base.model, settings)
        print(f"{name}: KL {rows[name]['kl']:.5f}", flush=True)
    print(markdown(rows))
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
        document = {"versions": versions(), "commit": commit.strip(), "tokens": TOKENS, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
