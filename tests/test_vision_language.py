"""Vision-language models: the text decoder is quantized with text, the vision tower comes along byte for byte.

Oracles: the model's own logits, with and without an image; the parent's tensors.
"""

import json
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    FLOAT32_ERROR,
    SIZES,
    distance,
    divergence,
    held_out,
    logits,
    run,
    save,
    sensitivity,
    settings,
    tokens,
)

import ptq
from ptq.config import AWQConfig
from ptq.evaluate import streamed
from ptq.formats.checkpoint import CheckpointReader
from ptq.lint import lint
from ptq.models.structure import find_blocks, linears
from ptq.nn import QuantLinear
from ptq.readers import REFUSES
from ptq.runtime import open_checkpoint, open_stream

TEXT = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGES = {"image_size": 32, "patch_size": 8}
QWEN = {
    "depth": 3,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 256,
    "out_hidden_size": 64,
    "patch_size": 4,
}
EXPERTS = {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1}
PROJECTOR = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
# Configuration, class, text and vision options; the towers have more parameters than the decoders.
MODELS = {
    "gemma3": ("Gemma3", {"sliding_window": 16}, {**TOWER, **IMAGES}, {"mm_tokens_per_image": 4}),
    "qwen2_5_vl": ("Qwen2_5_VL", SECTIONS, {**QWEN, "fullatt_block_indexes": [0]}, {}),
    "qwen3_vl": ("Qwen3VL", SECTIONS, {**QWEN, "deepstack_visual_indexes": [0]}, {}),
    "llama4": ("Llama4", EXPERTS, {**TOWER, **IMAGES, **PROJECTOR}, {}),
}


def build(name):
    import transformers

    family, text, vision, more = MODELS[name]
    config = getattr(transformers, f"{family}Config")(text_config={**TEXT, **text}, vision_config=vision, **more)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif "norm" in key:
                gains = torch.exp(torch.randn(parameter.shape, generator=generator) * 0.3)
                parameter.copy_(gains - 1 if name == "gemma3" else gains)
    return model


def require_forward(name):
    """Skip what transformers itself cannot run: Llama4ForConditionalGeneration of 5.24 reads images that it was not
    given."""
    if name == "llama4":
        try:
            build(name)(input_ids=tokens(1, 2))
        except AttributeError as error:
            pytest.skip(f"transformers runs no {name}: {error}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")

    @cache
    def directory(name, method=None):
        output = root / f"{name}-{method}"
        if method is None:
            return save(build(name), output)
        run(settings(directory(name), output, method, awq=AWQConfig(grid=4)))
        return output

    return directory


@pytest.mark.parametrize("name", MODELS)
def test_the_text_decoder_is_what_is_quantized(name, made):
    require_forward(name)
    model = build(name)
    assert find_blocks(model).endswith("language_model.layers") or name == "llama4"
    found = torch.stack([*streamed(open_stream(open_checkpoint(made(name)), torch.device("cpu")))([tokens(2, 40)])])
    assert distance(found, logits(model, tokens(2, 40))) <= sensitivity(model, tokens(2, 40), FLOAT32_ERROR)
    loaded = ptq.load(made(name, "gptq"), device="cpu")
    assert type(loaded) is type(model)
    packed = [path for path, module in loaded.named_modules() if isinstance(module, QuantLinear)]
    assert packed
    assert all(path.startswith(find_blocks(model)) for path in packed)
    left = [path for path, _ in linears(loaded) if path.startswith(find_blocks(model))]
    assert [path for path in left if not path.endswith("router")] == []


@pytest.mark.parametrize("name", MODELS)
def test_the_rest_keeps_its_bytes(name, made):
    parent, result = CheckpointReader(made(name)), CheckpointReader(made(name, "gptq"))
    vision = [key for key in parent.names() if "vis" in key]
    assert len(vision) > 20
    for key in set(parent.names()) & set(result.names()) | set(vision):
        assert torch.equal(parent.tensor(key), result.tensor(key))


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_codes_lose_less_than_rounding(name, made):
    require_forward(name)
    text = held_out(4, 48)
    parent = logits(build(name), text)
    kl = {m: divergence(parent, logits(ptq.load(made(name, m), device="cpu"), text)) for m in ("rtn", "gptq", "awq")}
    assert kl["gptq"] < 0.9 * kl["rtn"]
    assert kl["awq"] < 0.9 * kl["rtn"]


@torch.no_grad()
def test_an_image_reaches_the_quantized_decoder(made):
    """The tower and its projection still feed the decoder: other pixels, other logits, as close as text is."""
    model, loaded = build("gemma3"), ptq.load(made("gemma3", "gptq"), device="cpu")
    prompt = tokens(1, 12)
    prompt[:, 2:6] = model.config.image_token_id = loaded.config.image_token_id = 280
    given = {"input_ids": prompt, "token_type_ids": (prompt == 280).long()}
    pixels = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    one, other = (model(pixel_values=each, **given).logits for each in pixels)
    found = loaded(pixel_values=pixels[0], **given).logits
    assert distance(found, one) < 0.5 * distance(other, one)


@pytest.fixture(scope="module")
def as_on_the_hub(made, tmp_path_factory):
    """Gemma 3 with the names that its published files have, and vLLM's modules: a ``vision_model`` in the tower."""
    directory = tmp_path_factory.mktemp("hub")
    shutil.copytree(made("gemma3"), directory, dirs_exist_ok=True)
    shard = directory / "model.safetensors"
    renamed = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(shard).items()}
    save_file(renamed, shard, {"format": "pt"})
    return directory


def listed(config, names):
    """Whether each of some full names is one that a list leaves in float."""
    if config["quant_method"] == "gptq":
        return all(any(re.match(rule[2:], n) for rule in config["dynamic"] if rule.startswith("-:")) for n in names)
    return (
        set(config["ignore" if config["quant_method"] == "compressed-tensors" else "modules_to_not_convert"]) >= names
    )


@pytest.mark.parametrize("form", ["compressed-tensors", "awq", "gptq"])
def test_a_tower_is_named_as_its_file_has_it_and_as_transformers_does(as_on_the_hub, form, tmp_path):
    run(settings(as_on_the_hub, tmp_path / "out", "rtn", format=form))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layer = "encoder.layers.0.mlp.fc1"
    assert listed(config, {f"vision_tower.vision_model.{layer}", f"model.vision_tower.{layer}"})
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert type(loaded.get_submodule(f"model.vision_tower.{layer}")) is torch.nn.Linear
    assert {verdict.reader: verdict.status for verdict in lint(tmp_path / "out").readers}["vLLM"] != REFUSES
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        code = "import sys, torch, transformers as t; m = t.AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        code += "torch.save(m(torch.arange(8)[None]).logits.detach(), sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, tmp_path / "out", tmp_path / "logits"], check=True)
        there, here = torch.load(tmp_path / "logits"), logits(loaded, torch.arange(8)[None])
        assert distance(there, here) <= sensitivity(loaded, torch.arange(8)[None], FLOAT32_ERROR)


def test_a_tower_that_only_transformers_names_is_none_to_vllm(as_on_the_hub, tmp_path):
    """As releases before wrote it."""
    run(settings(as_on_the_hub, tmp_path / "out", "rtn", format="compressed-tensors"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [name for name in ignored if "vision_model" not in name]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    verdict = next(each for each in lint(tmp_path / "out").readers if each.reader == "vLLM")
    assert verdict.status == REFUSES
    assert "not as vision_tower.vision_model.encoder.layers.0" in verdict.reason


def test_a_model_packed_in_memory_names_its_tower_as_its_file_does(made, tmp_path):
    model = build("gemma3")
    ptq.quantize_linears(model, [tokens(2, 24)], method="rtn", group_size=32, exclude=["vision_tower", "lm_head"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    stored = {name.removesuffix(".weight") for name in CheckpointReader(tmp_path).names() if ".mlp.fc1.weight" in name}
    assert stored
    assert listed(config, stored)
