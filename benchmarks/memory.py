"""Whether memory depends on depth: peaks of anonymous memory of runs on random models of one width and several depths.

``python benchmarks/memory.py [--depths 8 64] [--width 256] [--offload memory disk] [--json FILE]``: each run has a
process of its own. A random model is as good as another here: nothing looks at the values.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "text" / "eval-novel.txt"
TOKENIZER = ROOT / "examples" / "tiny-llama"


def random_model(directory: Path, depth: int, width: int) -> Path:
    """A Llama in bfloat16, with the tokenizer of the example."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=-(-len(tokenizer) // 32) * 32, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def measured(parent: Path, output: Path, offload: str) -> dict[str, Any]:
    """Peak and prediction of one run, in this process."""
    from ptq.config import CalibrationConfig, DatasetConfig, GPTQConfig, RunConfig
    from ptq.pipeline import quantize
    from ptq.progress import Progress

    calibration = CalibrationConfig(DatasetConfig(files=(str(TEXT),)), samples=16, sequence_length=256, batch_size=4)
    config = RunConfig(
        model=str(parent), output=str(output), method="gptq", group_size=64, device="cpu",
        calibration=replace(calibration, offload=offload), gptq=GPTQConfig(scales="range", sweeps=0),
    )  # fmt: skip
    report = quantize(config, progress=Progress(io.StringIO()))
    prediction: dict[str, Any] = report.document["prediction"]
    return prediction


def main() -> None:
    """Measure every depth and way to keep hidden states, and print how far the peaks are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--offload", nargs="+", default=["memory", "disk"], choices=["memory", "disk"])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        parent, output, offload = options.one
        print(json.dumps(measured(Path(parent), Path(output), offload)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parents = {d: random_model(Path(folder) / f"{d}", d, options.width) for d in options.depths}
        for offload in options.offload:
            peaks = []
            for depth, parent in parents.items():
                arguments = [str(parent), f"{parent}-{offload}", offload]
                command = [sys.executable, __file__, "--one", *arguments]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = json.loads(done.stdout)
                rows.append({"depth": depth, "width": options.width, "offload": offload, **row})
                peaks.append(row["memory"]["actual"])
                print(f"{offload:6s} depth {depth:3d}: {row['memory']['actual'] / 1e6:.1f} MB at the peak, "
                      f"{row['memory']['predicted'] / 1e6:.1f} MB predicted")  # fmt: skip
            print(f"{offload:6s} the largest peak is {max(peaks) / min(peaks) - 1:.2%} above the smallest")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
