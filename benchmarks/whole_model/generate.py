"""Times ``ptq.load`` and ``generate``: started by __main__.py with a JSON object, prints one JSON line."""

import json
import sys
import time
from typing import Any

import ptq_kernels
import torch
from torch import Tensor

import ptq
from ptq.report import resident_bytes


class Stopwatch:
    """A streamer of transformers that notes when it is handed the prompt and every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with each token, once it is known."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` after the last token."""


def arguments(new: int) -> dict[str, Any]:
    """What ``generate`` is given."""
    return {"max_new_tokens": new, "do_sample": False, "cache_implementation": "static"}


def measure(model: Any, prompt: Tensor, settings: dict[str, Any]) -> dict[str, float]:
    """One call: seconds to the first token, and seconds a token after it."""
    watch = Stopwatch()
    started = time.perf_counter()
    model.generate(prompt, streamer=watch, **settings)
    _, first, *rest = watch.times  # the first entry is the prompt's
    return {"first_token": first - started, "token": (rest[-1] - first) / len(rest)}


@torch.inference_mode()  # not no_grad, which generate sets itself: autograd's part of every call is left out
def main() -> None:
    """Load, warm up, time."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    started = time.perf_counter()
    model = ptq.load(task["path"], device="cpu", fuse=True, compile=task["compiled"], head_bits=task["head_bits"])
    result: dict[str, Any] = {"load": time.perf_counter() - started}
    prompt = torch.randint(model.config.vocab_size, (1, task["prompt"]), generator=torch.Generator().manual_seed(0))
    settings = arguments(task["new"])
    started = time.perf_counter()
    # What is compiled is compiled for one length of the cache.
    model.generate(prompt, **settings if task["compiled"] else arguments(2))
    result["warm_up"] = time.perf_counter() - started
    result["runs"] = [measure(model, prompt, settings) for _ in range(task["repeats"])]
    result["memory_peak"] = resident_bytes(peak=True)
    result["kernels"] = ptq_kernels.chosen()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
