"""Loading a checkpoint in several ways and comparing logits."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.foreign.cells import Cell
from benchmarks.foreign.tools import drive, quantize
from benchmarks.quality.decode import read_dense

PROMPT = [[1, *range(7, 8000, 251)], [1, *range(3, 8000, 251)]]


def neutral_logits(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits ``[B, T, V]`` of a dense model with the weights that the neutral reader finds in a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)  # not the parent's: a packed head is not tied to the embedding
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense = read_dense(checkpoint, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    missing, _ = model.load_state_dict(dense.tensors, strict=False)
    if {"lm_head.weight"} & {*missing} and config.tie_word_embeddings:
        missing.remove("lm_head.weight")
    if missing:
        raise ValueError(f"{checkpoint} lacks {missing[0]}")
    return _logits(model.to(dtype))


def dense_logits(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits ``[B, T, V]`` of what `ptq.load` takes a checkpoint for, computed with dense products."""
    import ptq

    return _logits(ptq.load(checkpoint, device="cpu", impl="reference", dtype=str(dtype).removeprefix("torch.")))


def compare_theirs(checkpoint: Path) -> dict[str, Any]:
    """The largest differences of float32 logits to the neutral model's, as a share of its largest logit.

    ``load`` is `ptq.load`, ``from_pretrained`` the transformers function with a `ptq.PtqConfig`. A way that fails has
    its message instead.
    """
    from transformers import AutoModelForCausalLM

    import ptq
    from ptq.errors import PtqError

    neutral = neutral_logits(checkpoint)
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
    # A model of experts or with a tower has other parameters than its file has tensors: what they are ptq.load knows.
    logits = dense_logits if cell.parent else neutral_logits
    neutral, rounded = logits(checkpoint), logits(checkpoint, torch.bfloat16)
    said = load_file(file)
    if "logprobs" in said:
        neutral, rounded = neutral.log_softmax(-1), rounded.log_softmax(-1)
    found = {kind: _share(said[kind], neutral) for kind in ("logits", "logprobs") if kind in said}
    found["of bfloat16"] = _share(rounded, neutral)
    entry = {"versions": versions, "differences": found}
    if "logprobs" in said:
        entry["kl"] = {"logprobs": _divergence(said["logprobs"], neutral), "of bfloat16": _divergence(rounded, neutral)}
        entry["greedy"] = greedy_agreement(checkpoint, said["greedy"])
    return entry


def greedy_agreement(checkpoint: Path, found: Tensor) -> dict[str, Any]:
    """How many of a peer's greedy tokens ``[B, n]`` `ptq.load` finds most likely after what the peer wrote before.

    ``margin`` is the largest gap between the two best candidates' float32 logits, where they disagree.
    """
    import ptq

    prompts, count = torch.tensor(PROMPT), found.shape[1]
    model = ptq.load(checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        logits = model(torch.cat([prompts, found], 1)).logits[:, -count - 1 : -1]
    gaps = logits.amax(-1) - logits.gather(-1, found[..., None])[..., 0]
    return {"same": int((gaps == 0).sum()), "of": found.numel(), "margin": float(gaps.max())}


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(PROMPT)).logits
    return logits.float()


def _share(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _divergence(found: Tensor, expected: Tensor) -> float:
    """Mean KL divergence, in nats a token, of logarithms of probabilities."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())
