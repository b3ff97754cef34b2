"""Checkpoints as other tools write them, packed with Python integers: no code of the codecs under test is used.

Layouts follow what GPTQModel, AutoAWQ, compressed-tensors and AutoRound write; each comes with the dense float32
weights that its words mean.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tiny_models
import torch
from format_examples import packed_by_integers, random_weight
from safetensors.torch import save_file
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
MASK = 0xFFFFFFFF
# float32 sums of at most 128 products, in another order for act-order, through two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Kind(NamedTuple):
    """How a file is written."""

    layout: str  # gptq, gptq_v2, awq, compressed-tensors
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    ordered: bool = False  # act-order
    writer: str = "someone:1.0"
    auto_round: bool = False


class Stored(NamedTuple):
    """One weight: the tensors of a file, and the dense weight they mean."""

    tensors: dict[str, Tensor]
    dense: Tensor


def _words(codes: Tensor, bits: int) -> Tensor:
    rows = packed_by_integers(codes, bits)
    return torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in rows], dtype=torch.int32)


def _zero_words(zeros: Tensor, kind: Kind) -> Tensor:
    """GPTQ's ``[G, N*b/32]``; GPTQModel subtracts 1 of all fields of a word at once, borrows included."""
    if kind.layout == "gptq_v2":
        return _words(zeros.t(), kind.bits)
    if kind.writer.startswith("gptqmodel") and kind.bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, kind.bits))
        rows = [[(word - ones) & MASK for word in row] for row in packed_by_integers(zeros.t(), kind.bits)]
        return torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in rows], dtype=torch.int32)
    return _words(((zeros.int() - 1) % (1 << kind.bits)).to(torch.uint8).t(), kind.bits)


def stored_weight(n: int, k: int, kind: Kind, seed: int) -> Stored:
    """A random weight ``[N, K]`` in a file's layout."""
    columns = k if kind.group_size == -1 else kind.group_size
    codes, scales, zeros, bits, *_ = random_weight(n, k, kind.bits, columns, symmetric=kind.symmetric, seed=seed)
    if kind.layout == "gptq" and not kind.writer.startswith("gptqmodel"):
        zeros = zeros.clamp(min=1)
    order = torch.arange(k) // columns
    if kind.ordered:
        order = order[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    scales = scales / 8
    dense = scales[:, order] * (codes.int() - zeros.int()[:, order]).float()
    if kind.layout == "compressed-tensors":
        tensors = {"weight_packed": _words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
        if not kind.symmetric:
            tensors["weight_zero_point"] = _words(zeros.t(), bits).t().contiguous()
        if kind.ordered:
            tensors["weight_g_idx"] = order.int()
    elif kind.layout == "awq":
        tensors = {
            "qweight": _words(codes.t().reshape(k, -1, 8)[..., AWQ_ORDER].reshape(k, n), 4),
            "qzeros": _words(zeros.t().reshape(-1, n // 8, 8)[..., AWQ_ORDER].reshape(-1, n), 4),
            "scales": scales.t().half().contiguous(),
        }
    else:
        tensors = {
            "qweight": _words(codes, bits).t().contiguous(),
            "qzeros": _zero_words(zeros, kind),
            "scales": scales.t().half().contiguous(),
            "g_idx": order.int(),
        }
    return Stored(tensors, dense)


def settings(kind: Kind) -> dict[str, Any]:
    """The ``quantization_config`` that stands beside such tensors."""
    sized = {"bits": kind.bits, "group_size": kind.group_size}
    if kind.auto_round:
        layout = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round", "awq": "auto_round:auto_awq"}[kind.layout]
        return {
            "quant_method": "auto-round",
            "packing_format": layout,
            "sym": kind.symmetric,
            "data_type": "int",
            **sized,
        }
    if kind.layout == "awq":
        return {"quant_method": "awq", "version": "gemm", "zero_point": True, **sized}
    if kind.layout == "compressed-tensors":
        strategy = (
            {"strategy": "channel"} if kind.group_size == -1 else {"strategy": "group", "group_size": kind.group_size}
        )
        weights = {"num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric, **strategy}
        weights |= {"actorder": "group"} if kind.ordered else {}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
            "quantization_status": "compressed", "ignore": ["lm_head"],
        }  # fmt: skip
    return {
        "quant_method": "gptq", "checkpoint_format": kind.layout, "sym": kind.symmetric, "desc_act": kind.ordered,
        "meta": {"quantizer": [kind.writer]}, **sized,
    }  # fmt: skip


def write(directory: Path, kind: Kind, model: Any = None, **changes: Any) -> Any:
    """Write a checkpoint of a small Llama (or ``model``) and put the weights its words mean into the model.

    ``changes`` go into the quantization_config.
    """
    model = tiny_models.build("llama") if model is None else model
    tensors = dict(model.state_dict())
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = stored_weight(*module.weight.shape, kind, seed)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.tensors.items()}
            module.weight.data.copy_(stored.dense)
    save(directory, tensors, model.config, {**settings(kind), **changes})
    return model.eval()


def save(directory: Path, tensors: dict[str, Tensor], config: Any, quantization: dict[str, Any] | None) -> None:
    """Two shards and their index, and config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    half = len(names) // 2
    files = {f"model-0000{i}-of-00002.safetensors": part for i, part in ((1, names[:half]), (2, names[half:]))}
    for file, part in files.items():
        save_file({name: tensors[name].clone() for name in part}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    document = json.loads(config.to_json_string()) | {"dtype": "float32"}
    if quantization is not None:
        document["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(document))


def logits(model: Any) -> Tensor:
    """Float32 logits of a fixed prompt."""
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 40, 3)[None]).logits
    return found.float()
