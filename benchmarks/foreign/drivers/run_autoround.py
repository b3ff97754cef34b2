"""AutoRound: writes checkpoints in the formats of others and in its own."""

import torch
from auto_round import AutoRound
from foreign_job import Job, main, rows_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer


def write(job: Job) -> None:
    """Quantize and save."""
    model = AutoModelForCausalLM.from_pretrained(job.parent, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.parent)
    rows = torch.tensor(rows_of(job))
    settings = dict(job.settings)
    layout = settings.pop("format")
    layers = {"layer_config": settings.pop("layer_config")} if "layer_config" in settings else {}
    rounder = AutoRound(
        model, tokenizer=tokenizer, scheme={"act_bits": 16, "data_type": "int", **settings}, iters=2,
        dataset=list(rows.split(4)), nsamples=len(rows), seqlen=rows.shape[1], batch_size=4, device_map="cpu", **layers,
    )  # fmt: skip
    rounder.quantize()
    rounder.save_quantized(job.output, format=layout)


def read(job: Job) -> None:
    """Logits of a checkpoint, through transformers and AutoRound's own kernels."""
    config = AutoRoundConfig(bits=job.settings["bits"])  # sends a GPTQ or AWQ checkpoint to AutoRound
    model = AutoModelForCausalLM.from_pretrained(job.output, dtype="auto", device_map="cpu", quantization_config=config)
    with torch.no_grad():
        logits = model(torch.tensor(job.prompt)).logits
    save_file({"logits": logits.float().contiguous()}, job.logits)


if __name__ == "__main__":
    main(write, read, "auto-round")
