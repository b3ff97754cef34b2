"""Model types that transformers loads or names in its own way, through `ptq.load`, ``from_pretrained`` and both saved.

Oracle: the logits of `ptq.load` and the names in the file that was read.
"""

import json
import sys
from pathlib import Path

import foreign_files
import pytest
import tiny_models
import torch
from foreign_files import Kind
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import ptq
from ptq import runtime
from ptq.evaluate import streamed
from ptq.export import export_gguf
from ptq.formats.checkpoint import CheckpointReader
from ptq.nn import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import architectures  # noqa: E402

# Their modules initialize the weights of their children by name; falcon has a Linear of its own.
BY_NAME = (
    "gpt2",
    "gpt_bigcode",
    "mamba",
    "falcon_mamba",
    "modernbert-decoder",
    "nanochat",
    "recurrent_gemma",
    "falcon",
)
RENAMED = ("got_ocr2", "fuyu")  # transformers' modules have other names than its files


@pytest.mark.parametrize("kind", [*BY_NAME, *RENAMED])
def test_every_way_in_and_out(kind, tmp_path):
    """`ptq.load` and ``from_pretrained``, and what either writes: the same logits and the names of the file."""
    config = architectures.tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    architectures.randomize(model)
    tiny_models.save(model, tmp_path / "parent")
    (tmp_path / "parent" / architectures.TEXT_FILE).write_text(tiny_models.TEXT.read_text()[:2000])
    exclude = ("lm_head", "*.dt_proj") if "mamba" in kind else ("lm_head",)
    tiny_models.run(architectures.settings(tmp_path / "parent", tmp_path / "ours", "rtn", exclude))
    loaded = ptq.load(tmp_path / "ours", device="cpu")
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    packed = [[n for n, m in model.named_modules() if isinstance(m, QuantLinear)] for model in (loaded, other)]
    assert packed[0] == packed[1] != []
    batch = tiny_models.tokens(2, 24)
    expected = tiny_models.logits(loaded, batch)
    assert torch.equal(tiny_models.logits(other, batch), expected)
    for name, each in (("loaded", loaded), ("other", other)):
        each.save_pretrained(tmp_path / name)
        assert set(CheckpointReader(tmp_path / name).names()) == set(CheckpointReader(tmp_path / "ours").names())
        assert torch.equal(tiny_models.logits(ptq.load(tmp_path / name, device="cpu"), batch), expected)


def test_a_model_without_its_head_keeps_the_names_of_the_file(tmp_path):
    foreign_files.write(tmp_path / "ours", Kind("gptq", writer="ptq:0.1.0"))
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "copy")
    left = set(CheckpointReader(tmp_path / "ours").names()) - set(CheckpointReader(tmp_path / "copy").names())
    assert left == {"lm_head.weight"}


EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.fixture(params=[1.1, 1.0], ids=["differing", "equal"])
def factor(request):
    """What the head of a model is, as a multiple of the embedding that its configuration ties it to."""
    return request.param


def with_both(name, factor, directory, dtype=torch.float32, **options):
    """A model directory that holds the head beside the embedding."""
    tiny_models.save(tiny_models.build(name, dtype, tie_word_embeddings=True), directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = factor * tensors[EMBEDDINGS[name]]
    save_file(tensors, file, {"format": "pt"})
    if options:  # in shards, of the same tensors
        file.unlink()
        shards = {"model-00001-of-00002.safetensors": [n for n in tensors if n != "lm_head.weight"],
                  "model-00002-of-00002.safetensors": ["lm_head.weight"]}  # fmt: skip
        for shard, names in shards.items():
            save_file({n: tensors[n] for n in names}, directory / shard, {"format": "pt"})
        weight_map = {n: shard for shard, names in shards.items() for n in names}
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def says_tied(directory):
    return json.loads((directory / "config.json").read_text())["tie_word_embeddings"]


def every_reading(directory, batch):
    """The logits that this project has of a checkpoint: in memory, a block at a time, and of a saved copy."""
    loaded = ptq.load(directory, device="cpu")
    yield tiny_models.logits(loaded, batch)
    checkpoint = runtime.open_checkpoint(directory)
    yield torch.stack([*streamed(runtime.open_stream(checkpoint, torch.device("cpu")))([batch])])
    loaded.save_pretrained(directory.parent / "copy")
    yield tiny_models.logits(AutoModelForCausalLM.from_pretrained(directory.parent / "copy"), batch)


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("llama", {"sharded": True}), ("gpt2", {})])
def test_a_head_of_its_own_is_used_whatever_the_configuration_ties(name, options, factor, tmp_path):
    """Oracle: transformers, which ties no two tensors of a checkpoint that differ."""
    parent = with_both(name, factor, tmp_path / "parent", **options)
    batch = tiny_models.tokens(2, 24)
    model = AutoModelForCausalLM.from_pretrained(parent)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (factor == 1)
    for found in every_reading(parent, batch):
        torch.testing.assert_close(found, tiny_models.logits(model, batch), rtol=1e-5, atol=1e-5)
    assert runtime.read_config(parent).tie_word_embeddings == (factor == 1)


def test_a_quantized_checkpoint_keeps_a_head_of_its_own(factor, tmp_path):
    """Oracle: transformers, whose model has the same packed Linears; also under a configuration that ties the head.

    Another head's logits (up to 25) would be off by a tenth; products round as the processor and their rows have it.
    """
    parent, out, batch = with_both("llama", factor, tmp_path / "parent"), tmp_path / "out", tiny_models.tokens(2, 24)
    tiny_models.run(tiny_models.settings(parent, out, "rtn"))
    assert says_tied(out) == (factor == 1)
    want = tiny_models.logits(AutoModelForCausalLM.from_pretrained(out), batch)
    for found in every_reading(out, batch):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
    head = AutoModelForCausalLM.from_pretrained(parent).lm_head.weight
    assert torch.equal(ptq.load(out, device="cpu").lm_head.weight, head)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    for found in every_reading(out, batch):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)


def test_a_packed_head_is_made_of_the_head_and_not_of_the_embedding(factor, tmp_path):
    parent = with_both("llama", factor, tmp_path / "parent")
    tiny_models.run(tiny_models.settings(parent, tmp_path / "out", "rtn", exclude=(), bits=8))
    loaded, model = ptq.load(tmp_path / "out", device="cpu"), AutoModelForCausalLM.from_pretrained(parent)
    assert says_tied(tmp_path / "out") is False
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    error = (loaded.lm_head.dequantize(torch.float32) - model.lm_head.weight).abs().max()
    assert error < model.lm_head.weight.abs().max() / 127  # a step of 8 bits; another head is off by 10 %


def test_a_gguf_file_has_a_head_of_its_own(factor, tmp_path):
    """Oracle: the tensor of the checkpoint, and transformers' reader of the file."""
    parent = with_both("llama", factor, tmp_path / "parent", torch.bfloat16)
    done = export_gguf(str(parent), "F16", str(tmp_path))
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=done.path.name, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    batch = tiny_models.tokens(2, 24)
    want = tiny_models.logits(model, batch)
    torch.testing.assert_close(tiny_models.logits(read, batch), want, rtol=1e-4, atol=1e-4)
    matrices = sum(value.dim() == 2 for value in load_file(parent / "model.safetensors").values())
    assert done.kinds["F16"] == matrices - (factor == 1)  # output.weight is left out where it is the embedding
