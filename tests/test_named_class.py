"""Checkpoints of classes that are no causal language model. Oracle: the class with which transformers reads them."""

import pytest
import tiny_models
import torch
import transformers
from tiny_models import EXCERPT, run, save, settings, tokens

import ptq
from ptq import cli
from ptq.config import BitBudget, EvaluationConfig, GPTQConfig, RefineConfig
from ptq.errors import UnsupportedModelError
from ptq.lint import lint
from ptq.plan import make_plan

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"vocab_size": tiny_models.VOCABULARY, "max_position_embeddings": 128, "num_key_value_heads": 2, **SIZES}
ENCODER = {"vocab_size": tiny_models.VOCABULARY, "max_position_embeddings": 128, **SIZES}
PAIR = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART = {"vocab_size": tiny_models.VOCABULARY, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, **PAIR}
T5 = {"vocab_size": tiny_models.VOCABULARY, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
BLIP2 = {
    "text_config": transformers.OPTConfig(
        vocab_size=tiny_models.VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=128,
    ),
    "vision_config": {**SIZES, "image_size": 16, "patch_size": 8},
    "qformer_config": {**SIZES, "encoder_hidden_size": 64, "vocab_size": 32},
}  # fmt: skip
# Class and what its configuration is made of.
MODELS = {
    "LlamaForSequenceClassification": ("LlamaConfig", {**DECODER, "num_labels": 1}),
    "LlamaForTokenClassification": ("LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "MistralModel": ("MistralConfig", DECODER),
    "BertForMaskedLM": ("BertConfig", ENCODER),
    "BertForSequenceClassification": ("BertConfig", ENCODER),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "Blip2ForConditionalGeneration": ("Blip2Config", BLIP2),
}
ENCODE = ["BartForConditionalGeneration", "T5ForConditionalGeneration", "Blip2ForConditionalGeneration"]


def parent(name, directory):
    config, options = MODELS[name]
    torch.manual_seed(0)
    return save(getattr(transformers, name)(getattr(transformers, config)(**options)).eval(), directory)


@torch.no_grad()
def first(model):
    """The first of what a model puts out for a text."""
    return model(tokens(1, 16))[0]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ENCODE])
def test_a_class_is_quantized_and_loaded_as_it_is_named(name, tmp_path, capsys):
    directory = parent(name, tmp_path / "parent")
    kind = getattr(transformers, name)
    assert torch.equal(first(ptq.load(directory, device="cpu")), first(kind.from_pretrained(directory)))
    run(settings(directory, tmp_path / "out", bits=8))
    loaded, theirs = ptq.load(tmp_path / "out", device="cpu"), kind.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(theirs) is kind
    torch.testing.assert_close(first(loaded), first(theirs))
    found = lint(tmp_path / "out")
    assert found.problems == []
    assert not any("is extra" in note for note in found.notes)
    for command, *options in (["eval", "--window", "64", "--text", str(EXCERPT)], ["export", "--type", "F16"]):
        assert cli.main([command, str(directory), *options]) != 0
        assert f"predicts the next token; config.json names {name}, which does not" in capsys.readouterr().err


@pytest.mark.parametrize("name", ENCODE)
def test_what_needs_more_than_text_is_packed_in_memory(name, tmp_path):
    directory = parent(name, tmp_path / "parent")
    with pytest.raises(UnsupportedModelError, match=f"run on text alone .*; {name} needs (what its enc|pixel_values)"):
        make_plan(settings(directory, tmp_path / "out"))
    model = getattr(transformers, name).from_pretrained(directory)
    ptq.quantize_linears(model, method="rtn", group_size=32)
    model.save_pretrained(tmp_path / "made")
    loaded = ptq.load(tmp_path / "made", device="cpu")
    assert type(loaded) is type(model)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_a_base_model_is_the_language_model_whose_head_is_its_embedding(tmp_path):
    config = transformers.Qwen3Config(**DECODER, tie_word_embeddings=True)
    loaded = ptq.load(save(transformers.Qwen3Model(config), tmp_path), device="cpu")
    assert type(loaded) is transformers.Qwen3ForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"evaluation": EvaluationConfig(files=(str(EXCERPT),))}, "evaluation"),
        ({"bits": BitBudget(3.5)}, "a bit budget"),
        ({"refine": RefineConfig(model_steps=2)}, "refine.model_steps"),
        ({"gptq": GPTQConfig(gradient_tokens=2)}, "gptq.gradient_tokens"),
    ],
)
def test_what_is_measured_on_text_needs_a_model_that_predicts_it(changes, named, tmp_path):
    directory = parent("LlamaForSequenceClassification", tmp_path / "parent")
    with pytest.raises(UnsupportedModelError, match=f"^{named} needs a model that predicts the next token"):
        make_plan(settings(directory, tmp_path / "out", **changes))
