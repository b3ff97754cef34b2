"""GPTQModel: writes checkpoints, and reads those of others with its plain torch kernels."""

import torch
from foreign_job import Job, main, rows_of
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CONFIGS = {"gptq": GPTQConfig, "awq": AWQConfig}


def write(job: Job) -> None:
    """Quantize and save."""
    config = CONFIGS[job.method](device="cpu", **job.settings)
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            for row in rows_of(job)]  # fmt: skip
    model = GPTQModel.load(job.parent, config)
    # The default backend of AWQ needs CUDA.
    arguments = {"backend": BACKEND.AWQ_TORCH} if job.method == "awq" else {}
    model.quantize(calibration=rows, batch_size=4, **arguments)
    model.save(job.output)


def read(job: Job) -> None:
    """Logits of a checkpoint."""
    if job.settings.get("through") == "transformers":
        model = AutoModelForCausalLM.from_pretrained(job.output, dtype="auto", device_map="cpu")
    else:
        backend = BACKEND.AWQ_TORCH if job.method == "awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(job.output, device="cpu", backend=backend).model
    with torch.no_grad():
        logits = model(torch.tensor(job.prompt)).logits
    save_file({"logits": logits.float().contiguous()}, job.logits)


if __name__ == "__main__":
    main(write, read, "gptqmodel")
