"""How close a dense float32 model is to its parent on each held-out text.

float32 on both sides: bfloat16's rounding alone moves the KL of a small model by 0.0003, as much as good codes differ.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibration.data import evaluation_windows
from ptq.config import EvaluationConfig
from ptq.evaluate import Metrics, compare, in_memory
from ptq.models.loading import load_tokenizer

TEXTS = ("eval-nonfiction", "eval-novel")
TOKENS, WINDOW = 48 * 1024, 512


def evaluate(parent: Path, models: Mapping[str, Mapping[str, Tensor]], texts: Path) -> dict[str, dict[str, Any]]:
    """Metrics of the parent (under ``parent``) and of every model, by text and over both together.

    Args:
        parent: directory of the parent.
        models: tensors of each model, the parent's own under ``parent``.
        texts: directory of the held-out texts.
    """
    built = {name: build(parent, tensors) for name, tensors in models.items()}
    reference = in_memory(built.pop("parent"))
    others = {name: in_memory(model) for name, model in built.items()}
    tokenizer = load_tokenizer(parent, False)
    found: dict[str, dict[str, Metrics]] = {name: {} for name in models}
    for text in TEXTS:
        config = EvaluationConfig(files=(str(texts / f"{text}.txt"),), tokens=TOKENS, window=WINDOW, stride=WINDOW)
        for name, metrics in compare(reference, others, evaluation_windows(config, tokenizer)).items():
            found[name][text] = metrics
    for by_text in found.values():
        by_text["both"] = together(by_text)
    return {name: {text: m._asdict() for text, m in by_text.items()} for name, by_text in found.items()}


def together(by_text: Mapping[str, Metrics]) -> Metrics:
    """Metrics over several texts, each token counting once."""
    parts = list(by_text.values())
    tokens = sum(m.tokens for m in parts)

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(v * m.tokens for v, m in zip(known, parts, strict=True)) / tokens if known else None

    nll = mean([math.log(m.perplexity) for m in parts])
    return Metrics(math.exp(nll or 0.0), mean([m.kl for m in parts]), mean([m.top1 for m in parts]), tokens)


def build(parent: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The parent's architecture in float32 with these tensors; names the file does not hold are tied ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(parent), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    tied = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    if unexpected or set(missing) - tied:
        raise ValueError(f"{parent}: tensors must be the model's, found missing {missing}, unexpected {unexpected}")
    return model.eval()
