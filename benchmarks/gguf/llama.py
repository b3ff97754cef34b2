"""llama.cpp's side of the comparison; runs in an environment of its own, with llama-cpp-python and numpy.

    python benchmarks/gguf/llama.py JOB.json

The job is ``{"quantize": [[input, output, number], ...], "score": {name: file}, "windows": FILE.npy,
"parent": FILE.npy, "lines": [text, ...], "prompts": [[token, ...], ...], "greedy": count}``; the answer is printed as
JSON: for each scored file perplexity, KL divergence to the parent and top-1 agreement over the windows, the tokens of
the lines, the greedy continuations, and the kind of every tensor.
"""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama


def quantize(source: str, target: str, number: int) -> None:
    """Let llama.cpp round a file to one of its types."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = number, 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings):
        raise SystemExit(f"llama.cpp could not quantize {source} to type {number}")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def score(llm: Llama, windows: np.ndarray, parent: np.ndarray) -> dict[str, float]:
    """Means over all tokens of the windows but each first one."""
    nll = kl = same = count = 0.0
    for window, reference in zip(windows, parent, strict=True):
        llm.reset()
        llm.eval(window.tolist())
        own = log_softmax(llm.scores[: len(window) - 1])
        theirs = log_softmax(reference[:-1])
        nll -= own[np.arange(len(own)), window[1:]].sum()
        kl += (np.exp(theirs) * (theirs - own)).sum()
        same += (own.argmax(-1) == theirs.argmax(-1)).sum()
        count += len(own)
    return {"perplexity": float(np.exp(nll / count)), "kl": kl / count, "top1": same / count, "tokens": int(count)}


def greedy(llm: Llama, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation."""
    llm.reset()
    llm.eval(prompt)
    found: list[int] = []
    for _ in range(count):
        found.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(found[-1:])
    return found


def kinds(file: str) -> dict[str, str]:
    """Block format of every tensor."""
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job."""
    for source, target, number in job.get("quantize", []):
        quantize(source, target, number)
    windows, parent = np.load(job["windows"]), np.load(job["parent"], mmap_mode="r")
    answer: dict[str, Any] = {"versions": {"llama-cpp-python": llama_cpp.__version__}, "files": {}}
    for name, file in job["score"].items():
        llm = Llama(
            file, n_ctx=windows.shape[1], n_batch=windows.shape[1], n_threads=1, n_threads_batch=1, logits_all=True,
            verbose=False,
        )  # fmt: skip
        answer["files"][name] = {
            **score(llm, windows, parent),
            "megabytes": Path(file).stat().st_size / 1e6,
            "greedy": [greedy(llm, prompt, job["greedy"]) for prompt in job["prompts"]],
            "kinds": kinds(file),
        }
        if "lines" not in answer:
            answer["lines"] = [llm.tokenize(line.encode(), add_bos=True, special=False) for line in job["lines"]]
        llm.close()
    return answer


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
