"""What transformers does by itself with our compressed-tensors files of one class or another.

Oracle: transformers' own loading, without ptq's quantizer, and its report of it.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny_experts
import torch
from tiny_models import GROUPED, SIZES, logits, run, save, settings, tokens
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FalconConfig, FalconMambaConfig, LlamaConfig

import ptq
from ptq.lint import lint
from ptq.models.stock import initialization_error
from ptq.readers import REFUSES, SLOWER, UNKNOWN

pytest.importorskip("compressed_tensors")
IDS = tokens(1, 8)
QUICK = ("mixtral", "gpt_oss", "llama4")  # gathered, left out, replaced by a list of experts
EVERY = sorted(tiny_experts.CONFIGS | tiny_experts.OTHERS)


def quantized(model: nn.Module, root: Path) -> Path:
    run(settings(save(model, root / "parent"), root / "packed", "rtn", format="compressed-tensors"))
    return root / "packed"


def stock(directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model as transformers' own quantizer loads it, and the keys it misses or does not expect."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=CompressedTensorsConfig(**options), output_loading_info=True
    )
    return model, report


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in EVERY])
def test_experts_that_transformers_leaves_out_are_said_so(name: str, tmp_path: Path) -> None:
    directory = quantized(tiny_experts.build(name, num_hidden_layers=2 if name.startswith("deepseek") else 1), tmp_path)
    transformers, *engines = lint(directory).readers
    model, report = stock(directory)
    left_out = bool(report["unexpected_keys"])
    assert left_out == bool(report["missing_keys"]) == (name in ("gpt_oss", "granitemoe", "aria"))
    assert (transformers.status == REFUSES) == ("use ptq.load" in transformers.reason) == left_out
    assert [engine.status == UNKNOWN for engine in engines] == [left_out] * 2
    wanted = logits(ptq.load(directory, device="cpu"), IDS)
    # float32 sums in another order, or random experts
    assert torch.allclose(logits(model, IDS), wanted, atol=1e-3) != left_out
    ours = AutoModelForCausalLM.from_pretrained(directory)  # what the reason says instead
    assert torch.equal(logits(ours, IDS), wanted)


SMALL = {**SIZES, "hidden_size": 64, "num_hidden_layers": 1}
DENSE = {
    "llama": LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}),
    "falcon": FalconConfig(**SMALL, num_attention_heads=4),
    "falcon_mamba": FalconMambaConfig(**SMALL, state_size=16, time_step_rank=32),
}


@pytest.mark.parametrize("name", DENSE)
def test_classes_that_want_weights_to_initialize_are_said_so(name: str, tmp_path: Path) -> None:
    """Falcon's reads them from every FalconLinear, FalconMamba's from its mixers' out_proj."""
    directory = quantized(AutoModelForCausalLM.from_config(DENSE[name]), tmp_path)
    verdict = lint(directory).readers[0]
    assert verdict.status == SLOWER
    if name == "llama":
        assert "dequantize" not in verdict.reason
        model, _ = stock(directory)
    else:
        with pytest.raises(AttributeError) as raised:
            stock(directory)
        assert f"dequantize=True), as the class stops at packed weights ({raised.value})" in verdict.reason
        model, _ = stock(directory, dequantize=True)
    # float32 sums in another order
    torch.testing.assert_close(logits(model, IDS), logits(ptq.load(directory, device="cpu"), IDS), atol=1e-3, rtol=1e-3)


class Initialized(nn.Module):
    """What stops for a reason of its own stops without packed weights, too."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.linear, self.message = nn.Linear(2, 2, device="meta"), message

    def initialize_weights(self) -> None:
        assert self.linear._parameters == {"bias": self.linear.bias}
        raise AttributeError(self.message)


@pytest.mark.parametrize(("message", "counts"), [("'Linear' object has no attribute 'weight'", True), ("else", False)])
def test_a_skeleton_is_whole_again_after_it_was_tried(message: str, counts: bool) -> None:
    model = Initialized(message)
    weight = model.linear.weight
    assert initialization_error(model, ["linear"]) == (message if counts else "")
    assert model.linear.weight is weight
