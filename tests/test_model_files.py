"""Values in the files beside a model's weights that transformers and tokenizers stop at end in a sentence."""

import json

import pytest
import torch
from tiny_models import build, save

import ptq
from ptq.errors import FormatError, UnsupportedModelError
from ptq.models.loading import build_skeleton, load_tokenizer, read_config


@pytest.fixture
def parent(tmp_path):
    return save(build("llama"), tmp_path / "parent")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("tokenizer.json", "model", None), ("tokenizer.json", "normalizer", {"type": "Other"}),
     ("tokenizer_config.json", "model_max_length", "x")],
)  # fmt: skip
def test_a_tokenizer_with_a_value_that_is_none(name, key, value, parent):
    document = json.loads((parent / name).read_text())
    (parent / name).write_text(json.dumps({**document, key: value}))
    with pytest.raises(FormatError, match="must be a tokenizer's; .*: fetch both again"):
        load_tokenizer(parent, False)


@pytest.mark.parametrize("text", ["[1]", "5", "{", '{"cache_implementation": "x"}', "[" * 100_000])
def test_settings_of_generation_that_are_none(text, parent):
    (parent / "generation_config.json").write_text(text)
    with pytest.raises(FormatError, match="must hold settings of generation; transformers refuses it: .*: correct it"):
        ptq.load(parent, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 0), ("head_dim", 0), ("_attn_implementation", "flash_attention_2")]
)
def test_values_that_no_model_can_be_built_with(key, value, parent):
    document = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises((FormatError, UnsupportedModelError), match=r"config.json must describe a model"):
        build_skeleton(read_config(parent), torch.float32)


def test_a_module_that_could_not_be_loaded_is_no_fault_of_the_configuration(parent, monkeypatch):
    """Ctrl-C may have come while it was loaded, which the command line then says."""

    def fail(*_):
        raise ImportError("could not import a model") from KeyboardInterrupt()

    monkeypatch.setattr("ptq.models.loading.model_of", fail)
    with pytest.raises(ImportError, match="could not import a model"):
        build_skeleton(read_config(parent), torch.float32)


@pytest.mark.parametrize(("architecture", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_more_layers_than_tensors_are_not_built(architecture, key, tmp_path, monkeypatch):
    """A million would take hours; whoever has files that cannot be read is told of these."""
    parent = save(build(architecture), tmp_path / "parent")
    document = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**document, key: 10**6}))
    monkeypatch.setattr("ptq.models.loading.model_of", None)
    with pytest.raises(FormatError, match=r"must be what the files .* hold; it is 1000000, and they have \d+ tensors"):
        read_config(parent)
    (parent / "model.safetensors").write_bytes(b"x")
    assert read_config(parent).num_hidden_layers == 10**6
