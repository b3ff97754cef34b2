"""AutoRound. Methods: rtn, autoround, awq, awq+autoround."""

import torch
from auto_round import AutoRound
from job import Job, main, measured, through_identity, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

ALGORITHMS = {"rtn": "rtn", "autoround": "auto_round", "awq": "awq", "awq+autoround": ["awq", "auto_round"]}


def quantize(job: Job) -> None:
    """Quantize and save."""
    model = AutoModelForCausalLM.from_pretrained(job.parent, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.parent)
    rows = torch.tensor(token_ids(job))
    scheme = {"bits": job.bits, "group_size": job.group_size, "sym": job.symmetric, "act_bits": 16, "data_type": "int"}
    rounder = AutoRound(
        model, tokenizer=tokenizer,
        scheme=scheme,
        alg_configs=ALGORITHMS[job.method], dataset=list(rows.split(job.batch_size)), nsamples=len(rows),
        seqlen=rows.shape[1], batch_size=job.batch_size, device_map="cpu", seed=job.seed, **job.options,
    )  # fmt: skip
    with measured(job, "auto-round"):
        rounder.quantize()
    # What it takes for asymmetric 4 bits by itself, AWQ's layout, fails in 0.16.1 with a TypeError.
    layout = "auto_round" if job.symmetric or job.bits != 4 else "auto_round:gptqmodel"
    rounder.save_quantized(job.output, format=layout)
    tokenizer.save_pretrained(job.output)


def read(job: Job) -> dict[str, torch.Tensor]:
    """Dense weights as the library's own inference kernels see them."""
    model = AutoModelForCausalLM.from_pretrained(job.output, dtype="auto", device_map="cpu")
    return through_identity(model, job.modules)


if __name__ == "__main__":
    main(quantize, read)
