"""llm-compressor. Methods: rtn, gptq, awq, awq+gptq."""

from datasets import Dataset
from job import Job, main, measured, token_ids
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job: Job) -> None:
    """Quantize and save."""
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": job.bits, "type": "int", "symmetric": job.symmetric, "strategy": "group",
                    "group_size": job.group_size, **job.options.get("weights", {})},
    }  # fmt: skip
    last = GPTQModifier if "gptq" in job.method.split("+") else QuantizationModifier
    recipe = [last(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    if "awq" in job.method.split("+"):
        recipe.insert(0, AWQModifier(**job.options.get("awq", {})))
        # AWQ pins its cache, which torch refuses on a machine without an accelerator; it is for speed only.
        IntermediatesCache.pin_memory = lambda *_arguments: None
    model = AutoModelForCausalLM.from_pretrained(job.parent, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.parent)
    arguments = {} if job.method == "rtn" else _calibration(job)
    with measured(job, "llmcompressor", "compressed-tensors"):
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **arguments)
    model.save_pretrained(job.output, save_compressed=True)
    tokenizer.save_pretrained(job.output)


def _calibration(job: Job) -> dict:
    rows = token_ids(job)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    return {
        "dataset": data,
        "num_calibration_samples": len(rows),
        "max_seq_length": len(rows[0]),
        "batch_size": job.batch_size,
        "shuffle_calibration_samples": False,
    }


def read(job: Job) -> dict[str, Tensor]:
    """Dense weights as compressed-tensors decompresses them into a transformers model."""
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(job.output, dtype="auto", quantization_config=config)
    return {name: model.get_submodule(name).weight for name in job.modules}


if __name__ == "__main__":
    main(quantize, read)
