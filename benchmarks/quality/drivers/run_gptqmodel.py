"""GPTQModel. Methods: gptq, awq, rtn."""

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig, RTNConfig
from job import Job, main, measured, through_identity, token_ids

CONFIGS = {"gptq": GPTQConfig, "awq": AWQConfig, "rtn": RTNConfig}


def quantize(job: Job) -> None:
    """Quantize and save."""
    layout = FORMAT.GEMM if job.method == "awq" else FORMAT.GPTQ if job.symmetric else FORMAT.GPTQ_V2
    config = CONFIGS[job.method](
        bits=job.bits, group_size=job.group_size, sym=job.symmetric, format=layout, device="cpu",
        **_options(job.options),
    )  # fmt: skip
    # The library calls a sequence that is all ones in its mask complete; every row here is.
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            for row in token_ids(job)]  # fmt: skip
    torch.manual_seed(job.seed)
    model = GPTQModel.load(job.parent, config)
    arguments = {} if job.method == "rtn" else {"calibration": rows, "batch_size": job.batch_size}
    if job.method == "awq":
        arguments["backend"] = BACKEND.AWQ_TORCH  # the default backend of this format needs CUDA
    with measured(job, "gptqmodel"):
        model.quantize(**arguments)
    model.save(job.output)


def _options(options: dict) -> dict:
    if options.get("gptaq"):
        from gptqmodel.quantization.config import GPTAQConfig

        return {**options, "gptaq": GPTAQConfig()}
    return options


def read(job: Job) -> dict[str, torch.Tensor]:
    """Dense weights as the library's plain torch kernels see them."""
    backend = BACKEND.AWQ_TORCH if job.method == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(job.output, device="cpu", backend=backend)
    return through_identity(model.model, job.modules)


if __name__ == "__main__":
    main(quantize, read)
