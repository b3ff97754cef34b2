"""llm-compressor: writes compressed-tensors checkpoints, and reads those of others through transformers."""

import torch
from datasets import Dataset
from foreign_job import Job, main, rows_of
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def write(job: Job) -> None:
    """Quantize and save."""
    groups = {f"group_{i}": {"targets": targets, "weights": {"type": "int", **weights}}
              for i, (targets, weights) in enumerate(job.settings["groups"])}  # fmt: skip
    recipe = [GPTQModifier(config_groups=groups, ignore=job.settings.get("ignore", ["lm_head"]))]
    model = AutoModelForCausalLM.from_pretrained(job.parent, dtype="auto")
    rows = rows_of(job)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model, recipe=recipe, dataset=data, num_calibration_samples=len(rows), max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(job.output, save_compressed=True)


def read(job: Job) -> None:
    """Logits of a checkpoint."""
    config = CompressedTensorsConfig(**job.settings)
    model = AutoModelForCausalLM.from_pretrained(job.output, dtype="auto", quantization_config=config)
    with torch.no_grad():
        logits = model(torch.tensor(job.prompt)).logits
    save_file({"logits": logits.float().contiguous()}, job.logits)


if __name__ == "__main__":
    main(write, read, "llmcompressor", "compressed-tensors")
