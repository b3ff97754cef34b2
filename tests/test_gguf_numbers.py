"""Numbers that a GGUF file cannot hold, or only coarsely: what the export says of them.

Oracle: models with one such number in one tensor, which the sentence must name.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import export, solving_on
from tiny_models import build, save
from torch import nn

from ptq.config import RunConfig
from ptq.errors import NumericsError
from ptq.export import show


@pytest.fixture(scope="module")
def solving(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return solving_on(tmp_path_factory.mktemp("text") / "text.txt")


def changed(folder: Path, change: Callable[[nn.Module], None]) -> Path:
    """A tiny llama in float32 with some of its weights changed."""
    model = build("llama")
    with torch.no_grad():
        change(model)
    return save(model, folder / "model")


def setter(parameter: str, value: float) -> Callable[[nn.Module], None]:
    """One number of a parameter becomes another."""

    def change(model: nn.Module) -> None:
        model.get_parameter(parameter).flatten()[5] = value

    return change


NAN, INF = float("nan"), float("inf")
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("type_name", "parameter", "value", "message"),
    [
        (
            "F16",
            EMBEDDING,
            1e6,
            r"must be finite in F16, which holds at most 65504; .* value is 1e\+06: export a block",
        ),
        ("F16", "model.norm.weight", NAN, "must be finite; 1 of 64 values are NaN or infinite: check"),
        ("Q4_0", "model.norm.weight", NAN, "must be finite; 1 of 64 values are NaN"),
        ("Q4_0", "model.layers.1.input_layernorm.weight", INF, "must be finite; 1 of 64 values are NaN"),
        ("F16", UP, INF, "must be finite; 1 of 8192 values are NaN"),
        ("Q4_0", UP, INF, "must be finite; 1 of 8192 values are NaN"),
        ("Q4_0", EMBEDDING, NAN, "must be finite; 1 of 18432 values are NaN"),
        ("Q4_0", "lm_head.weight", NAN, "must be finite; 1 of 18432 values are NaN"),
        ("Q4_1", UP, -1e5, r"must be small enough for Q4_1, .* most 65504 .*; its largest weight is 1e\+05: export"),
        ("Q4_1", EMBEDDING, -1e5, r"must be small enough for Q4_1, .*; its largest weight is 1e\+05: export another"),
    ],
)
def test_the_tensor_is_named(tmp_path, solving, type_name, parameter, value, message):
    model = changed(tmp_path, setter(parameter, value))
    with pytest.raises(NumericsError, match=f"^{parameter} {message}"):
        export(model, type_name, tmp_path / "file.gguf", None if type_name == "F16" else solving)
    assert not (tmp_path / "file.gguf").exists()


def test_large_weights_pass_where_the_kind_holds_them(tmp_path, solving):
    """Q8_0 reaches 128 times as far as Q4_1."""
    done = export(changed(tmp_path, setter(UP, 1e5)), "Q8_0", tmp_path, solving)
    assert "too small" not in show(done)


def test_weights_too_small_for_a_scale_are_told(tmp_path, solving):
    """Sixteen groups of the one, all of the other: rows of 64 are two groups of 32."""

    def change(model: nn.Module) -> None:
        model.get_parameter(UP)[:8] *= 1e-9
        model.get_parameter(EMBEDDING).mul_(1e-9)

    done = export(changed(tmp_path, change), "Q4_0", tmp_path, solving)
    assert (
        f"592 groups of weights in 2 tensors ({UP}, {EMBEDDING}) are too small for a float16 scale and rounded with "
        "its least, 2**-24"
    ) in show(done)
