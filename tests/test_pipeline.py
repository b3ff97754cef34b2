"""What a run can be asked for: formats, bits, heads, overrides, shards, names; and the checkpoint that comes out.

Oracle: the codes of one format against those of another, transformers with compressed-tensors, the parent's bytes.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    BFLOAT16_ERROR,
    FLOAT32_ERROR,
    build,
    distance,
    logits,
    run,
    save,
    sensitivity,
    settings,
    tokens,
)

import ptq
from ptq.config import SchemeOverride
from ptq.errors import ConfigError
from ptq.formats import CODECS, Scheme
from ptq.formats.capability import problem
from ptq.formats.checkpoint import CheckpointReader
from ptq.nn import QuantLinear
from ptq.plan import make_plan
from ptq.plan_size import describe, estimate_size
from ptq.runtime import open_checkpoint

BATCH = tokens(4, 48, 9)
KINDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
# The safetensors header of a shard: about 100 bytes a tensor.
HEADER_BYTES = 160


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("llama") / "parent")


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quantization(directory: Path):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_every_format_holds_the_same_codes(bits, symmetric, llama, tmp_path):
    """Whatever a format can hold, it gives back; estimates are right to the header."""
    weights = {}
    for name in CODECS:
        if problem(name, Scheme(bits, 32, symmetric), (32, 32)) is not None:
            continue
        config = settings(llama, tmp_path / name, "rtn", format=name, bits=bits, symmetric=symmetric)
        plan = make_plan(config)
        run(config)
        loaded = ptq.load(tmp_path / name, device="cpu")
        assert len(packed(loaded)) == 14
        weights[name] = {path: module.quantized() for path, module in packed(loaded).items()}
        assert torch.isfinite(logits(loaded, BATCH[:1, :8])).all()
        written = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        tensors = len(CheckpointReader(tmp_path / name).names())
        assert 0 < written - estimate_size(plan).after < HEADER_BYTES * tensors
    first, *others = weights.values()
    assert len(weights) == {(4, True): 4, (4, False): 3}.get((bits, symmetric), 3 if symmetric else 2)
    for other in others:
        for path, quantized in first.items():
            assert quantized[3:] == other[path][3:] == (bits, 32, symmetric)
            assert all(torch.equal(a, b) for a, b in zip(quantized[:3], other[path][:3], strict=True))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_compressed_tensors_loads_with_transformers_alone(method, llama, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    run(settings(llama, tmp_path / "out", method, format="compressed-tensors"))
    own = CompressedTensorsConfig()  # transformers' own reader, not the one ptq brings
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=own).eval()
    ours = ptq.load(tmp_path / "out", device="cpu", impl="reference")
    # Stock weights are the products rounded to bfloat16, ours are exact: one more rounding.
    allowed = sensitivity(build("llama", torch.bfloat16), BATCH, 2 * BFLOAT16_ERROR)
    assert distance(logits(ours, BATCH), logits(stock, BATCH)) <= allowed
    dense = ptq.load(llama, device="cpu")
    for path, module in packed(ours).items():
        dense.get_submodule(path).weight.copy_(module.dequantize(torch.bfloat16))
    for path, parameter in dense.named_parameters():
        if path in dict(ours.named_parameters()):  # awq changes the norms
            parameter.copy_(ours.get_parameter(path))
    assert torch.equal(logits(dense, BATCH), logits(stock, BATCH))


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_head_is_quantized_when_it_is_not_excluded(name, form, tmp_path):
    """Llama's is free. Qwen2's is tied to the embedding, which stays while the head gets a weight of its own."""
    model = build(name)
    parent = save(model, tmp_path / "parent")
    config = settings(parent, tmp_path / "out", "rtn", format=form, exclude=(), bits=4)
    plan = make_plan(config)
    report = run(config)
    assert "lm_head" in report.modules
    assert report.document["kept_in_float"] == []
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert isinstance(loaded.lm_head, QuantLinear)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    result = CheckpointReader(tmp_path / "out")
    size = sum(result.files().values()) - estimate_size(plan).after
    assert 0 < size < HEADER_BYTES * len(result.names())
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    want = hidden @ loaded.lm_head.dequantize(torch.float32).T
    torch.testing.assert_close(loaded.lm_head(hidden), want, rtol=0, atol=64 * 2.0**-24 * float(want.abs().max()))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_calibrated_head(name, method, tmp_path):
    """The embedding of a tied head keeps its bytes although the head's codes were solved in its memory."""
    model = build(name)
    parent = save(model, tmp_path / "parent")
    report = run(settings(parent, tmp_path / "out", method, exclude=()))
    row = report.modules["lm_head"]
    assert row["solver"] in ("gptq", "rtn", "awq")
    assert row["tokens"] == 8 * 48
    assert row["relative_loss"] <= row["relative_rounding_loss"]
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.isfinite(logits(loaded, BATCH)).all()


def test_a_tied_head_stored_under_its_own_name_alone(tmp_path):
    parent = save(build("qwen2"), tmp_path / "parent")
    file = parent / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="lm_head can be quantized only where .* has lm_head.weight alone"):
        make_plan(settings(parent, tmp_path / "out", "rtn", exclude=()))
    run(settings(parent, tmp_path / "out", "rtn"))
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, tensors["lm_head.weight"])


MIXED = {
    "mlp.down_proj": SchemeOverride(bits=8, group_size=-1),
    "model.layers.1.*_proj": SchemeOverride(bits=3),
    "model.layers.1.self_attn.v_proj": SchemeOverride(bits=2, group_size=64),
}


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
def test_overrides_and_exclusions(form, llama, tmp_path):
    exclude = ("lm_head", "model.layers.0.self_attn.o_proj", "gate_proj")
    run(settings(llama, tmp_path / "out", format=form, exclude=exclude, overrides=MIXED))
    loaded = ptq.load(tmp_path / "out", device="cpu")
    found = {path: (module.bits, module.group_size) for path, module in packed(loaded).items()}
    expected = {}
    for path in ("q_proj", "k_proj", "v_proj", "o_proj"):
        expected[f"model.layers.0.self_attn.{path}"] = (4, 32)
        expected[f"model.layers.1.self_attn.{path}"] = (3, 32)
    del expected["model.layers.0.self_attn.o_proj"]
    expected["model.layers.1.self_attn.v_proj"] = (2, 64)
    expected |= {"model.layers.0.mlp.up_proj": (4, 32), "model.layers.0.mlp.down_proj": (8, 128)}
    expected |= {"model.layers.1.mlp.up_proj": (3, 32), "model.layers.1.mlp.down_proj": (3, 128)}
    assert found == expected
    parent = ptq.load(llama, device="cpu")
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"):
        assert torch.equal(loaded.get_submodule(path).weight, parent.get_submodule(path).weight)
    assert torch.isfinite(logits(loaded, BATCH)).all()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_awq_and_gptq_leave_out_what_is_excluded(method, llama, tmp_path):
    """Half of the readers of a norm excluded: the norm must not be scaled under them."""
    run(settings(llama, tmp_path / "out", method, exclude=("lm_head", "q_proj", "down_proj"), bits=8))
    loaded, parent = ptq.load(tmp_path / "out", device="cpu"), ptq.load(llama, device="cpu")
    assert not any(path.endswith(("q_proj", "down_proj")) for path in packed(loaded))
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(loaded.get_parameter(norm), parent.get_parameter(norm))
    # Eight bits lose next to nothing, so a wrong fold would stand out.
    assert distance(logits(loaded, BATCH), logits(parent, BATCH)) < 0.1 * float(logits(parent, BATCH).std())


def without_prefix(parent: Path, prefix: str) -> None:
    file = parent / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    # The masks that old versions stored among the weights.
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(2)}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_names_without_the_base_models_prefix(form, tmp_path):
    """As gpt2 is on the hub. Tensors keep the parent's names; the configuration means modules, as readers do."""
    model = build("gpt2")
    parent = save(model, tmp_path / "parent")
    without_prefix(parent, "transformer.")
    overrides = {"transformer.h.1.mlp.c_fc": SchemeOverride(bits=8)}
    run(settings(parent, tmp_path / "out", format=form, overrides=overrides, exclude=("lm_head", "attn.c_proj")))
    names = CheckpointReader(tmp_path / "out").names()
    assert not any(name.startswith("transformer.") for name in names)
    assert {"h.0.attn.bias", "h.1.attn.bias", "wte.weight", "h.0.attn.c_proj.weight"} <= set(names)
    named = json.dumps(quantization(tmp_path / "out"))
    assert "transformer" in named or "(?:.+" in named  # as the module, or with any path before the blocks
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert {path: module.bits for path, module in packed(loaded).items()} == {
        f"transformer.h.{i}.{path}": 8 if (i, path) == (1, "mlp.c_fc") else 4
        for i in range(2)
        for path in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
    }
    dense = build("gpt2")
    with torch.no_grad():
        for path, module in packed(loaded).items():
            dense.get_submodule(path).weight.copy_(module.dequantize(torch.float32).T)
    allowed = sensitivity(dense, BATCH, FLOAT32_ERROR)
    assert distance(logits(loaded, BATCH), logits(dense, BATCH)) <= allowed


def test_shards_on_both_sides(tmp_path):
    """A parent in several files; a result in several files that transformers' index describes."""
    model = build("llama")
    parent = save(model, tmp_path / "parent", max_shard_size="60KB")
    assert len(list(parent.glob("*.safetensors"))) > 2
    one = save(model, tmp_path / "one")
    for source, output in ((parent, "a"), (one, "b")):
        run(settings(source, tmp_path / output, max_shard_size="40KB"))
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == set(CheckpointReader(tmp_path / "a").names())
    first, second = (logits(ptq.load(tmp_path / name, device="cpu"), BATCH) for name in "ab")
    assert torch.equal(first, second)


# Weights of other frameworks and of what other tools made of them, and what would tell readers of those tools.
OF_OTHERS = (
    *(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "tf_model.h5",
        "tf_model.h5.index.json",
    ),
    *(
        "flax_model.msgpack",
        "flax_model.msgpack.index.json",
        "rust_model.ot",
        "model.onnx",
        "model.onnx_data",
        "a.mlmodel",
    ),
    *("weights.npz", "model.ckpt.index", "model.ckpt.data-00000-of-00001", "all.tar.gz", "all.zip", "model.gguf"),
    *("quant_config.json", "hf_quant_config.json", "recipe.yaml", ".hidden.json", "picture.png", "notes.md"),
)
# Code, tokenizers of all kinds, chat templates, processors, licences.
OF_USE = (
    *(
        "modeling_x.py",
        "kernel.cu",
        "chat_template.jinja",
        "preprocessor_config.json",
        "LICENSE",
        "license.txt",
        "NOTICE",
    ),
    *("tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "vocab.bpe", "merges.txt", "source.spm", "bpe.codes"),
)


def test_what_stands_beside_the_weights(llama, tmp_path):
    (llama / "README.md").write_text("the parent's card")
    for name in OF_OTHERS:
        (llama / name).write_bytes(b"{}")
    for name in OF_USE:
        (llama / name).write_text("of use")
    run(settings(llama, tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "ptq_config.yaml", "quantize_config.json",
        "report.html", "report.json", "tokenizer.json", "tokenizer_config.json", *OF_USE,
    }  # fmt: skip
    assert {(tmp_path / "out" / name).read_text() for name in OF_USE} == {"of use"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert quantization(tmp_path / "out") == json.loads((tmp_path / "out" / "quantize_config.json").read_text())


def test_a_run_in_another_dtype(llama, tmp_path):
    run(settings(llama, tmp_path / "out", dtype="float32"))
    reader = CheckpointReader(tmp_path / "out")
    floats = {reader.spec(name)[0] for name in reader.names() if name.endswith((".weight", ".bias"))}
    assert floats == {torch.float32}
    assert open_checkpoint(tmp_path / "out").dtype == torch.float32


def test_the_plan_is_described(llama, tmp_path):
    text = describe(make_plan(settings(llama, tmp_path / "out", overrides=MIXED)))
    for line in (
        "blocks     model.layers, 2 of them",
        "calibrate  8 sequences of 48 tokens, seed 0",
        "quantize      1 x 64 x 128: 8 bits, 1 group a row, symmetric",
        "quantize      2 x 64 x 64: 3 bits, 2 groups of 32 a row, symmetric",
        "keep       1 Linears in float: lm_head",
    ):
        assert line in text.splitlines(), text
    excluded = describe(make_plan(settings(llama, tmp_path / "out", exclude=("lm_head", "self_attn"))))
    assert "self_attn.v_proj, model.layers.0.self_attn.o_proj and 5 more\n" in excluded
