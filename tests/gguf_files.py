"""GGUF files written by this project and read by others: the gguf package and transformers."""

import io
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import quants
from tiny_models import TEXT

from ptq.config import CalibrationConfig, DatasetConfig, RunConfig
from ptq.export import Exported, export_gguf
from ptq.progress import Progress


def export(model: Path, type_name: str, out: Path, config: RunConfig | None = None, **options: Any) -> Exported:
    return export_gguf(str(model), type_name, str(out), config, progress=Progress(io.StringIO()), **options)


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def dense(path: Path, name: str) -> torch.Tensor:
    """A tensor's values, rows in the file's order."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())


def read(path: Path) -> Any:
    """The model as transformers reads the file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def solving_on(path: Path) -> RunConfig:
    """Two short sequences, on the CPU, of a text that is put in ``path``."""
    path.write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    calibration = CalibrationConfig(dataset=DatasetConfig(files=(str(path),)), samples=2, sequence_length=32)
    return RunConfig(model="", output="", method="gptq", device="cpu", calibration=calibration)
