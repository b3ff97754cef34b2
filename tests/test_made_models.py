"""Models of transformers that `ptq.quantize_linears` packed in memory, saved with their own ``save_pretrained``.

Oracle: the logits of the model in memory, which every reader of the written directory must give, bit for bit.
"""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import tiny_experts
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import ptq
from ptq.errors import FormatError, PtqError
from ptq.formats.checkpoint import CheckpointReader
from ptq.lint import lint
from ptq.nn import QuantLinear
from ptq.nn.fuse import fuse_linears
from ptq.plan import make_plan

BATCHES = [tiny_models.tokens(2, 24, seed) for seed in (1, 2)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def logits(model):
    with torch.no_grad():
        return model(tiny_models.tokens(2, 16)).logits


def settings(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def save(model, directory):
    """Write a model and compare what is read with what was written, in both ways; a checkpoint is sound, too."""
    expected, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(directory)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    read = [ptq.load(directory, device="cpu"), AutoModelForCausalLM.from_pretrained(directory)]
    for each in read:
        assert torch.equal(logits(each), expected)
    assert lint(directory).problems == []
    return read


def packed(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_one_pass(method, dtype, tmp_path):
    model = tiny_models.build("llama", dtype)
    ptq.quantize_linears(model, BATCHES, method=method, group_size=32, symmetric=method != "awq", exclude=["lm_head"])
    read = save(model, tmp_path)
    assert [packed(each) for each in read] == [packed(model)] * 2
    assert all(each.dtype == dtype for each in read)
    assert settings(tmp_path)["checkpoint_format"] == ("gptq_v2" if method == "awq" else "gptq")


def test_several_passes_with_other_settings(tmp_path):
    model = tiny_models.build("llama", torch.bfloat16)
    ptq.quantize_linears(model, BATCHES, group_size=32, exclude=["lm_head", "*.mlp.*", "*.0.self_attn.q_proj"])
    first = {name: value.clone() for name, value in model.state_dict().items()}
    save(model, tmp_path / "first")
    ptq.quantize_linears(
        model, method="rtn", bits=8, group_size=-1, symmetric=False, exclude=["lm_head", "*.up_proj", "*.q_proj"]
    )
    ptq.quantize_linears(model, method="rtn", bits=3, group_size=64, exclude=["lm_head", "*.q_proj"])
    again = {name: value for name, value in model.state_dict().items() if name in first and "self_attn" in name}
    assert again
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    read = save(model, tmp_path / "second")
    layer = read[0].model.layers[0]
    found = {name: (m.bits, m.group_size, m.symmetric) for name, m in layer.named_modules() if name in packed(layer)}
    assert found["self_attn.k_proj"] == (4, 32, True)
    assert found["mlp.down_proj"] == (8, 128, False)
    assert found["mlp.up_proj"] == (3, 64, True)
    assert isinstance(layer.self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("exclude", [["lm_head"], []], ids=["shared", "packed"])
def test_tied_heads(exclude, tmp_path):
    model = tiny_models.build("llama", tie_word_embeddings=True)
    model.tie_weights()
    ptq.quantize_linears(model, BATCHES, group_size=32, exclude=exclude)
    for each in save(model, tmp_path):
        assert ("lm_head" in packed(each)) == (not exclude)
        assert not exclude or each.lm_head.weight is each.model.embed_tokens.weight
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == bool(exclude)
    assert "lm_head.weight" not in CheckpointReader(tmp_path).names()


def test_shapes_that_gptq_files_do_not_hold(tmp_path):
    model = tiny_models.build("llama", intermediate_size=136)
    ptq.quantize_linears(model, method="rtn", group_size=-1, exclude=["lm_head"])
    save(model, tmp_path)
    assert settings(tmp_path)["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "qwen2"])
def test_other_linears_and_biases(name, tmp_path):
    model = tiny_models.build(name)
    ptq.quantize_linears(model, BATCHES, group_size=32, exclude=["lm_head"])
    save(model, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_experts_in_stacks_stay_in_float(name, tmp_path):
    model = tiny_experts.build(name)
    with pytest.warns(UserWarning, match="a stack of 4 matrices"):
        ptq.quantize_linears(model, method="rtn", group_size=32, exclude=["lm_head"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed(again) == packed(model)
    assert torch.equal(logits(again), expected)
    # taken apart, experts add up in another order
    torch.testing.assert_close(logits(ptq.load(tmp_path, device="cpu")), expected, rtol=1e-4, atol=1e-4)
    assert lint(tmp_path).problems == []


def test_experts_that_were_taken_apart_are_written_packed(tmp_path):
    tiny_models.save(tiny_experts.build("mixtral"), tmp_path / "parent")
    model = ptq.load(tmp_path / "parent", device="cpu")
    ptq.quantize_linears(model, method="rtn", group_size=32, exclude=["lm_head"])
    assert any(".experts.3." in name for name in packed(model))
    save(model, tmp_path / "made")


def test_other_classes_of_models(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=tiny_models.VOCABULARY, **sizes)).eval()
    ptq.quantize_linears(model, BATCHES, group_size=32, exclude=["cls.*"])
    model.save_pretrained(tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path)
    assert packed(again) == packed(model) != set()
    assert torch.equal(logits(again), logits(model))


def test_an_encoder_and_a_decoder_that_share_an_embedding(tmp_path):
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=tiny_models.VOCABULARY, **sizes)).eval()
    given = {"input_ids": tiny_models.tokens(2, 16), "decoder_input_ids": tiny_models.tokens(2, 8)}
    ptq.quantize_linears(model, [given], group_size=32)
    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert packed(again) == packed(model) > {"lm_head"}
    assert again.encoder.embed_tokens.weight is again.shared.weight
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_model_inside_a_module(tmp_path):
    wrapper = nn.Sequential(tiny_models.build("llama"))
    ptq.quantize_linears(wrapper, BATCHES, group_size=32, exclude=["*.lm_head"])
    save(wrapper[0], tmp_path)


def test_copies_are_saved_as_well(tmp_path):
    model = tiny_models.build("llama", torch.bfloat16)
    ptq.quantize_linears(model, BATCHES, group_size=32, exclude=["lm_head"])
    save(copy.deepcopy(model), tmp_path / "copy")
    save(pickle.loads(pickle.dumps(model)), tmp_path / "pickle")
    save(model, tmp_path / "first")
    save(model, tmp_path / "second")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "copy", "pickle")]
    assert files[1:] == files[:1] * 3
    [again, _] = save(ptq.load(tmp_path / "first", device="cpu"), tmp_path / "third")
    assert packed(again) == packed(model)


def test_what_is_no_longer_as_it_was_packed(tmp_path):
    model = tiny_models.build("llama")
    ptq.quantize_linears(model, BATCHES, group_size=32, exclude=["lm_head"])
    whole = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 128)
    with pytest.raises(
        PtqError, match="layers that it put in, .*; model.layers.0.mlp.up_proj is another now, .* save b"
    ):
        model.save_pretrained(tmp_path / "replaced")
    model.model.layers[0].mlp.up_proj = whole
    fuse_linears(model)
    with pytest.raises(PtqError, match="packed can be saved with the layers that it put in"):
        model.save_pretrained(tmp_path / "fused")
    assert not list(tmp_path.glob("*/config.json"))


def test_more_layers_of_a_packed_checkpoint_are_refused(tmp_path):
    model = tiny_models.build("llama")
    ptq.quantize_linears(model, method="rtn", group_size=32, exclude=["lm_head"])
    model.save_pretrained(tmp_path / "made")
    loaded = ptq.load(tmp_path / "made", device="cpu")
    ptq.quantize_linears(loaded, method="rtn", group_size=32)
    with pytest.raises(PtqError, match="lm_head is packed now, in the checkpoint it is in float"):
        loaded.save_pretrained(tmp_path / "more")


def test_packed_tensors_without_a_configuration(tmp_path):
    """A part alone was quantized, and the whole is saved: transformers writes buffers that no configuration names."""
    model = tiny_models.build("llama")
    ptq.quantize_linears(model.model, method="rtn", group_size=32)
    model.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    message = (
        r"must be described by quantization_config in config.json; .* holds model.layers.0.*\.qweight \(14 such"
        r" in all\).* give quantize_linears the whole transformers model and call its save_pretrained, or run `ptq q"
    )
    runs = tiny_models.settings(tmp_path, tmp_path.with_name("again"), "rtn")
    for read in (ptq.load, lint, lambda _: make_plan(runs)):
        with pytest.raises(FormatError, match=message):
            read(tmp_path)


def test_transformers_is_not_imported_for_it():
    code = (
        "import sys, torch, ptq; m = torch.nn.Sequential(torch.nn.Linear(32, 32)); "
        "ptq.quantize_linears(m, method='rtn', group_size=32); "
        "print('transformers' in sys.modules, type(m[0]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "QuantLinear"]
