"""GGUF files of ``ptq export`` run by llama.cpp: same tokens, same perplexity, and better than llama.cpp's rounding.

    python -m benchmarks.gguf --llama PYTHON [--json benchmarks/results/gguf.json]

PYTHON is the interpreter of an environment with ``pip install --no-binary llama-cpp-python llama-cpp-python gguf``;
this one needs ``ptq[gguf]``. For each model (default examples/tiny-llama) llama.cpp scores a float16 file, its own
rounding of that to each type, the types solved by ptq with calibration text, and checkpoints carried over; what
``ptq eval`` says of the same checkpoints over the same tokens stands beside. All in float32 here; llama.cpp rounds
activations to 8 bits before it multiplies them with blocks.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptq.calibration.data import evaluation_windows
from ptq.config import CalibrationConfig, DatasetConfig, EvaluationConfig, RunConfig
from ptq.evaluation import evaluate_checkpoint
from ptq.export import export_gguf
from ptq.gguf.mix import FILE_TYPES
from ptq.models.loading import load_tokenizer
from ptq.pipeline import quantize
from ptq.report import versions
from ptq.runtime import load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEXT = ROOT / "examples/text"
EVALUATION = (str(TEXT / "eval-novel.txt"), str(TEXT / "eval-nonfiction.txt"))
SOLVED = ("Q4_0", "Q4_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K")
# Checkpoints whose codes go into the file as they are: file type and what is changed of a plain GPTQ run.
CARRIED: dict[str, dict[str, Any]] = {
    "Q4_0": {"group_size": 32},
    "Q4_1": {"group_size": 32, "symmetric": False, "format": "compressed-tensors"},
    "Q8_0": {"group_size": 32, "bits": 8},
    "Q4_K_M": {"group_size": 256, "symmetric": False, "format": "compressed-tensors"},
}
GREEDY = 24


def calibration(samples: int) -> CalibrationConfig:
    """The text that both the checkpoints and the files are solved on."""
    text = DatasetConfig(files=(str(TEXT / "calibration.txt"),))
    return CalibrationConfig(dataset=text, samples=samples, sequence_length=512)


def run_of(model: Path, output: Path, samples: int, **changes: Any) -> RunConfig:
    """A GPTQ run without evaluation."""
    return RunConfig(
        model=str(model), output=str(output), method="gptq", device="cpu", calibration=calibration(samples), **changes
    )


@torch.no_grad()
def parent_logits(model: Path, windows: torch.Tensor) -> np.ndarray:
    """float32 ``[windows, length, vocabulary]`` of the float model."""
    opened = load(model, device="cpu", dtype="float32")
    return torch.cat([opened(input_ids=window[None]).logits for window in windows]).numpy()


def fits_every_row(model: Path, changes: dict[str, Any]) -> bool:
    """Whether groups of this size divide the rows of every Linear."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    inner = config["num_attention_heads"] * config["head_dim"]
    return not any(k % changes["group_size"] for k in (config["hidden_size"], config["intermediate_size"], inner))


def measure(model: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one model."""
    settings = EvaluationConfig(files=EVALUATION, tokens=options.tokens, window=512)
    tokenizer = load_tokenizer(model, False)
    windows = torch.stack([window.tokens for window in evaluation_windows(settings, tokenizer)])
    np.save(folder / "windows.npy", windows.numpy())
    np.save(folder / "parent.npy", parent_logits(model, windows))
    float_file = export_gguf(str(model), "F16", str(folder), overwrite=True).path
    files, ours = {"F16": str(float_file)}, {"F16": evaluate(model, None, settings)}
    rounded = []
    for kind in SOLVED:
        files[f"{kind}, rounded by llama.cpp"] = str(folder / f"rounded-{kind}.gguf")
        rounded.append([str(float_file), str(folder / f"rounded-{kind}.gguf"), FILE_TYPES[kind].number])
        exported = export_gguf(str(model), kind, str(folder), run_of(model, folder, options.samples), overwrite=True)
        files[f"{kind}, solved"] = str(exported.path)
    for kind, changes in CARRIED.items():
        if not fits_every_row(model, changes):
            continue
        checkpoint = folder / f"checkpoint-{kind}"
        quantize(run_of(model, checkpoint, options.samples, **changes), overwrite=True)
        files[f"{kind}, carried over"] = str(export_gguf(str(checkpoint), kind, str(folder), overwrite=True).path)
        ours[f"{kind}, carried over"] = evaluate(checkpoint, model, settings)
    lines = [line for path in EVALUATION for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    job = {
        "quantize": rounded,
        "score": files,
        "windows": str(folder / "windows.npy"),
        "parent": str(folder / "parent.npy"),
        "lines": lines[: options.lines],
        "prompts": windows[:8, :32].tolist(),
        "greedy": GREEDY,
    }
    answer = ask(options.llama, job, folder)
    found = {name: compared(name, row, ours, answer) for name, row in answer["files"].items()}
    same = sum(tokenizer(line)["input_ids"] == ids for line, ids in zip(job["lines"], answer["lines"], strict=True))
    return {
        "lines_tokenized_alike": f"{same} of {len(job['lines'])}",
        "greedy_float16_as_transformers": greedy_agreement(model, job["prompts"], answer["files"]["F16"]["greedy"]),
        "tokens": answer["files"]["F16"]["tokens"],
        "files": found,
        "llama": answer["versions"],
    }


def evaluate(checkpoint: Path, parent: Path | None, settings: EvaluationConfig) -> dict[str, Any]:
    """What ``ptq eval`` says, in float32."""
    document = evaluate_checkpoint(
        str(checkpoint), None if parent is None else str(parent), settings, device="cpu", dtype="float32"
    )
    row: dict[str, Any] = document["models"]["result"]
    return row


def ask(python: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """llama.cpp's answer to a job."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [python, str(HERE / "llama.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} could not run the files; its last words: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compared(name: str, row: dict[str, Any], ours: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """One file's figures, and beside them ours or whether llama.cpp's quantizer chose the same kinds."""
    result = {key: row[key] for key in ("perplexity", "kl", "top1", "megabytes")}
    if name in ours:
        result["ptq_eval_perplexity"] = ours[name]["perplexity"]
        result["ptq_eval_kl"] = ours[name]["kl"]
        result["perplexity_to_ptq_eval"] = row["perplexity"] / ours[name]["perplexity"]
    if name.endswith("solved"):
        rounded = answer["files"][name.replace("solved", "rounded by llama.cpp")]
        result["kinds_as_llama_cpp"] = row["kinds"] == rounded["kinds"]
        result["kl_to_rounded"] = row["kl"] / rounded["kl"]
    return result


@torch.no_grad()
def greedy_agreement(model: Path, prompts: list[list[int]], found: list[list[int]]) -> dict[str, Any]:
    """Continuations that are the same, token for token, in transformers (float32) and llama.cpp (float16 products).

    Where one differs, ``margins`` has the gap in the float32 logits between the two candidates at that place.
    """
    opened = load(model, device="cpu", dtype="float32")
    same, margins = 0, []
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(GREEDY):  # past an end of text, too, as llama.py does
            ids = torch.cat([ids, opened(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        expected = ids[0, len(prompt) :].tolist()
        same += expected == continuation
        place = next((i for i, (a, b) in enumerate(zip(expected, continuation, strict=True)) if a != b), None)
        if place is not None:
            logits = opened(input_ids=ids[:, : len(prompt) + place]).logits[0, -1]
            margins.append(float(logits[expected[place]] - logits[continuation[place]]))
    return {"same": same, "of": len(prompts), "margins": margins}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, default=[ROOT / "examples/tiny-llama"], help="float models")
    parser.add_argument("--llama", required=True, metavar="PYTHON", help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--tokens", type=int, default=8192, help="evaluation tokens (default %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (default %(default)s)")
    parser.add_argument("--lines", type=int, default=400, help="lines to tokenize (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    document: dict[str, Any] = {"versions": versions(), "samples": options.samples, "models": {}}
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(model.resolve(), options, Path(folder))
        document["versions"] |= found.pop("llama")
        document["models"][model.resolve().name] = found
        greedy = found["greedy_float16_as_transformers"]
        print(f"{model.name}: lines tokenized alike {found['lines_tokenized_alike']}, greedy {greedy}")
        for name, row in found["files"].items():
            beside = f", ptq eval {row['ptq_eval_perplexity']:.3f}" if "ptq_eval_perplexity" in row else ""
            if "kl_to_rounded" in row:
                beside += f", {row['kl_to_rounded']:.2f} of rounding, same kinds {row['kinds_as_llama_cpp']}"
            quality = f"perplexity {row['perplexity']:.3f}, KL {row['kl']:.5f}"
            print(f"  {name:28s} {quality}, {row['megabytes']:.1f} MB{beside}")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
