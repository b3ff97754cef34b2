"""Loading a checkpoint in several ways and comparing logits."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.foreign.cells import Cell
from benchmarks.foreign.tools import drive, quantize
from benchmarks.quality.decode import read_dense, read_tensors

PROMPT = [[1, *range(7, 8000, 251)], [1, *range(3, 8000, 251)]]


def neutral_logits(parent: Path, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits ``[B, T, V]`` of the parent with the weights that the neutral reader finds in a checkpoint."""
    from transformers import AutoModelForCausalLM

    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(parent).items()}
    dense = read_dense(checkpoint, shapes)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    model.load_state_dict(dense.tensors, strict=False)
    return _logits(model.to(dtype))


def compare_theirs(parent: Path, checkpoint: Path) -> dict[str, Any]:
    """The largest differences of float32 logits to the neutral model's, as a share of its largest logit.

    ``load`` is `ptq.load`, ``from_pretrained`` the transformers function with a `ptq.PtqConfig`. A way that fails has
    its message instead.
    """
    from transformers import AutoModelForCausalLM

    import ptq
    from ptq.errors import PtqError

    neutral = neutral_logits(parent, checkpoint)
    found: dict[str, Any] = {}
    for impl in ("reference", "auto"):
        config = ptq.PtqConfig(impl=impl)
        ways = {
            f"load, {impl}": lambda impl=impl: ptq.load(checkpoint, device="cpu", impl=impl, dtype="float32"),
            f"from_pretrained, {impl}": lambda config=config: AutoModelForCausalLM.from_pretrained(
                checkpoint, quantization_config=config, dtype=torch.float32
            ),
        }
        for name, way in ways.items():
            try:
                found[name] = _share(_logits(way()), neutral)
            except PtqError as error:
                found[name] = str(error)
    return {"differences": found}


def compare_ours(parent: Path, cell: Cell, tool: str, settings: dict[str, Any], place: Path) -> dict[str, Any]:
    """A peer's logits for one of our checkpoints against the neutral model's, and what computing in bfloat16 costs.

    Raises:
        FailedError: the peer or ptq failed.
    """
    place.mkdir(parents=True, exist_ok=True)
    checkpoint = place / "checkpoint"
    if not checkpoint.is_dir():
        quantize(cell, parent, checkpoint, place)
    file = place / "logits.safetensors"
    job = {
        "output": str(checkpoint),
        "method": cell.method,
        "settings": settings,
        "prompt": PROMPT,
        "logits": str(file),
    }
    versions = drive(tool, job, place)
    neutral = neutral_logits(parent, checkpoint)
    rounded = neutral_logits(parent, checkpoint, torch.bfloat16)
    found = {"logits": _share(load_file(file)["logits"], neutral), "of bfloat16": _share(rounded, neutral)}
    return {"versions": versions, "differences": found}


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(PROMPT)).logits
    return logits.float()


def _share(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
