"""Times llama.cpp through llama-cpp-python: started by __main__.py with a JSON object, prints one JSON line.

Greedy decoding with the least Python around it: the evaluation of a batch and the largest of the last logits.
"""

import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


def next_token(model: Any) -> int:
    """The most likely token after the last evaluation."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))))


def measure(model: Any, prompt: list[int], new: int) -> dict[str, float]:
    """Seconds to the first token, and seconds a token after it."""
    model.reset()
    started = time.perf_counter()
    model.eval(prompt)
    token = next_token(model)
    first = time.perf_counter()
    for _ in range(new - 1):
        model.eval([token])
        token = next_token(model)
    return {"first_token": first - started, "token": (time.perf_counter() - first) / (new - 1)}


def main() -> None:
    """Load, warm up, time."""
    task = json.loads(sys.argv[1])
    started = time.perf_counter()
    model = llama_cpp.Llama(
        task["path"],
        n_ctx=task["prompt"] + task["new"],
        n_batch=task["prompt"],
        n_ubatch=task["prompt"],
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        flash_attn=task["flash_attention"],
        use_mmap=True,
        verbose=False,
    )
    result: dict[str, Any] = {"load": time.perf_counter() - started}
    prompt = np.random.default_rng(0).integers(model.n_vocab(), size=task["prompt"]).tolist()
    result["warm_up"] = measure(model, prompt, 4)["first_token"]
    result["runs"] = [measure(model, prompt, task["new"]) for _ in range(task["repeats"])]
    result["version"] = llama_cpp.__version__
    result["built_for"] = llama_cpp.llama_print_system_info().decode()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
