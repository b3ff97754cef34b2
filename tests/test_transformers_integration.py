"""``from_pretrained``, ``save_pretrained``, ``pipeline`` and ``generate`` of transformers with packed weights.

Oracle: `ptq.load` and dense models with the same weights; for what transformers reads itself, transformers.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_files
import pytest
import tiny_models
import torch
from foreign_files import CLOSE, Kind, logits
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
    pipeline,
)  # fmt: skip

import ptq
from ptq.errors import FormatError, PtqError
from ptq.formats import CODECS, Scheme
from ptq.integration import METHODS, install, is_ours
from ptq.integration.quantizer import PtqConfig, PtqQuantizer
from ptq.integration.slots import PackedSlot
from ptq.nn.linear import QuantLinear
from ptq.nn.swap import replace_module

ROOT = Path(__file__).resolve().parent.parent
SCHEME = Scheme(4, 32, True)


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of this project, in several shards, and its tokenizer."""
    directory = tmp_path_factory.mktemp("ours")
    model = foreign_files.write(directory, Kind("gptq", writer="ptq:0.1.0"))
    tiny_models.tokenizer().save_pretrained(directory)
    return directory, model


def test_own_checkpoints_need_no_word(ours):
    directory, model = ours
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert len(packed(loaded)) == 14
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(ptq.load(directory, device="cpu")))
    torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
    assert loaded.config.quantization_config.to_dict()["quant_method"] == "gptq"


def test_report_of_loading_has_nothing_to_report(ours):
    _, report = AutoModelForCausalLM.from_pretrained(ours[0], output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_dtype_and_device_map(ours):
    directory, model = ours
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="auto")
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert len(packed(loaded)) == 14
    found, expected = logits(loaded), logits(model)
    # bfloat16 rounds every activation to 8 bits
    assert tiny_models.divergence(expected, found) < 0.01
    each = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    each |= {f"model.layers.{i}": "cpu" for i in range(2)}
    spread = AutoModelForCausalLM.from_pretrained(directory, device_map=each)
    assert torch.equal(logits(spread), logits(AutoModelForCausalLM.from_pretrained(directory)))


def test_hooks_of_a_device_map_stay(ours, monkeypatch):
    """A model on several devices has a hook on every module; here it is put there by hand, on one device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    finish = PtqQuantizer._process_model_after_weight_loading

    def with_hook(self, model):
        add_hook_to_module(model.get_submodule(DOWN), AlignDevicesHook("cpu", io_same_device=True))
        finish(self, model)

    monkeypatch.setattr(PtqQuantizer, "_process_model_after_weight_loading", with_hook)
    loaded = AutoModelForCausalLM.from_pretrained(ours[0])
    assert isinstance(loaded.get_submodule(DOWN)._hf_hook, AlignDevicesHook)
    assert torch.equal(logits(loaded), logits(ptq.load(ours[0], device="cpu")))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_layers_that_wait_on_the_cpu(tmp_path, monkeypatch, offload_buffers):
    """A device map with less GPU than model makes accelerate hook modules so; here the GPU is a CPU, too."""
    import accelerate

    model = tiny_models.build("qwen2", tie_word_embeddings=False)  # q, k and v have a bias
    foreign_files.write(tmp_path, Kind("gptq", writer="ptq:0.1.0"), model)
    finish = PtqQuantizer._process_model_after_weight_loading

    def with_hooks(self, model):
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
        finish(self, model)

    monkeypatch.setattr(PtqQuantizer, "_process_model_after_weight_loading", with_hooks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    down = loaded.get_submodule(DOWN)
    assert down.qweight.is_meta
    assert down.scales.is_meta
    found = logits(loaded)
    assert down.qweight.is_meta  # again
    torch.testing.assert_close(found, logits(ptq.load(tmp_path, device="cpu")), **CLOSE)
    with pytest.raises(PtqError, match="waits on the CPU for its turn"):
        loaded.save_pretrained(tmp_path / "copy")


DOWN = "model.layers.0.mlp.down_proj"


def test_auto_device_map_counts_packed_bytes(ours):
    """The model's float size does not matter: three quarters of it are enough room for everything."""
    from accelerate.utils import compute_module_sizes

    from ptq.formats.checkpoint import CheckpointReader
    from ptq.packed import place_packed

    model = tiny_models.build("llama").to("meta")
    settings = json.loads((ours[0] / "config.json").read_text())["quantization_config"]
    place_packed(model, CheckpointReader(ours[0]), settings, lambda linear, s: PackedSlot(linear, s, torch.float32))
    assert compute_module_sizes(model)[DOWN] == 64 * 128 // 2 + 64 * 4 * 2  # four bits a weight, float16 scales


def test_weights_on_the_disk_are_refused(ours):
    with pytest.raises(FormatError, match="must be in memory, device_map has 'disk' for 'model.layers.1'"):
        AutoModelForCausalLM.from_pretrained(ours[0], device_map={"": "cpu", "model.layers.1": "disk"})
    loaded = AutoModelForCausalLM.from_pretrained(ours[0])
    replace_module(loaded, DOWN, PackedSlot(torch.nn.Linear(128, 64), SCHEME, torch.float32))
    with pytest.raises(FormatError, match=f"must be in memory, the device map puts {DOWN} on the disk"):
        loaded.hf_quantizer._load(loaded, DOWN)


def test_pipeline_and_generation(ours):
    directory, model = ours
    prompt = torch.arange(5, 25)[None]
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    # greedy choices of float32 logits that agree to 1e-4
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    static = loaded.generate(prompt, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)
    write = pipeline("text-generation", model=str(directory), device="cpu")
    assert len(packed(write.model)) == 14
    assert write("Once", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("Once")


def test_shards_of_another_model_are_refused(tmp_path):
    foreign_files.write(tmp_path, Kind("gptq", writer="ptq:0.1.0"))
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 160}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"gate_proj must be a packed 160 x 64 weight; .* holds \(128, 64\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_its_head(ours):
    loaded = AutoModel.from_pretrained(ours[0])
    assert len(packed(loaded)) == 14
    ids = torch.arange(3, 40, 3)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).last_hidden_state, ours[1].model(ids).last_hidden_state, **CLOSE)


def test_a_model_with_a_head_of_its_own(ours, tmp_path):
    """The head begins as transformers makes it, stays a float Linear, and is in a copy."""
    made = shutil.copytree(ours[0], tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    model = AutoModelForSequenceClassification.from_pretrained(made, num_labels=3)
    assert len(packed(model)) == 14
    assert type(model.score) is torch.nn.Linear
    assert model.score.weight.std() > 0
    ids = torch.arange(3, 40, 3)[None]
    with torch.no_grad():
        hidden = ours[1].model(ids).last_hidden_state[:, -1]
        torch.testing.assert_close(model(ids).logits, hidden @ model.score.weight.T, **CLOSE)
        model.save_pretrained(tmp_path / "copy")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "copy")
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_gradients_pass_to_adapters(ours):
    loaded = AutoModelForCausalLM.from_pretrained(ours[0])
    assert loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_compileable
    hidden = torch.randn(1, 3, 64, requires_grad=True)
    loaded.model.layers[0].mlp(hidden).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_load_and_save(ours, tmp_path):
    model = ptq.load(ours[0], device="cpu")
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(PtqError, match="stays packed in memory: .* `ptq merge`"):
        again.dequantize()
    fused = ptq.load(ours[0], device="cpu", fuse=True)
    with pytest.raises(PtqError, match="can be saved as it was loaded; .*_proj is .* now"):
        fused.save_pretrained(tmp_path / "fused")


def test_foreign_checkpoints_are_taken_over_when_asked(tmp_path):
    foreign_files.write(tmp_path, Kind("awq", symmetric=False))
    try:
        ptq.register()
        assert len(packed(AutoModelForCausalLM.from_pretrained(tmp_path))) == 14
        assert all(is_ours({"quant_method": method}) for method in METHODS)
        assert not is_ours({"quant_method": "bitsandbytes"})
    finally:
        ptq.register(override=False)
    assert not is_ours({"quant_method": "awq"})


def test_transformers_keeps_what_is_its_own(tmp_path):
    """compressed-tensors files of others without a word, and ours when its own configuration is passed."""
    pytest.importorskip("compressed_tensors")
    theirs = foreign_files.write(tmp_path / "theirs", Kind("compressed-tensors"))
    assert packed(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")) == []
    meta = {"quantizer": ["ptq:0.1.0"]}
    foreign_files.write(tmp_path / "ours", Kind("compressed-tensors"), meta=meta)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert packed(dense) == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert len(packed(loaded)) == 14
    torch.testing.assert_close(logits(loaded), logits(theirs), **CLOSE)


def test_what_cannot_be_read_is_said(ours, tmp_path):
    parent = tiny_models.build("llama")
    parent.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="this one has no quantization_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PtqConfig())
    config = AutoConfig.from_pretrained(ours[0])
    with pytest.raises(FormatError, match="was given a state_dict"):
        type(parent).from_pretrained(None, config=config, state_dict=parent.state_dict())


EXPERT = "model.layers.1.block_sparse_moe.experts.2"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Experts packed one by one under the names of the original files, one Linear of one expert left in float."""
    from test_moe import build

    model = build("mixtral", num_hidden_layers=2)
    directory = tmp_path_factory.mktemp("mixtral")
    kind = Kind("gptq", writer="ptq:0.1.0")
    state, tensors = model.state_dict(), {}
    for name, value in state.items():
        layer, _, leaf = name.partition(".mlp.experts.")
        stored = name.replace(".mlp.", ".block_sparse_moe.")
        if not leaf:
            tensors[stored] = value
            continue
        parts = {"w1": value[:, : value.shape[1] // 2], "w3": value[:, value.shape[1] // 2 :]}
        parts = parts if leaf == "gate_up_proj" else {"w2": value}
        for part, weights in parts.items():
            for index in range(len(value)):
                module = f"{layer}.block_sparse_moe.experts.{index}.{part}"
                if module == f"{EXPERT}.w2":
                    tensors[f"{module}.weight"] = weights[index].clone()
                    continue
                one = foreign_files.stored_weight(*weights[index].shape, kind, index)
                weights[index] = one.dense
                tensors |= {f"{module}.{key}": tensor for key, tensor in one.tensors.items()}
    # attention and the router stay in float
    skipped = {r"-:.*self_attn.*": {}, r"-:.*\.gate$": {}, r"-:.*router.*": {}}
    foreign_files.save(directory, tensors, model.config, {**foreign_files.settings(kind), "dynamic": skipped})
    model.load_state_dict(state)
    return directory, model.eval()


def test_fused_experts_stay_packed(mixtral, tmp_path):
    directory, model = mixtral
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    experts = loaded.config.num_local_experts
    assert len(packed(loaded)) == 2 * 3 * experts - 1
    assert torch.equal(logits(loaded), logits(ptq.load(directory, device="cpu")))
    torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
    # with all that transformers and its quantizer remember of the files
    assert torch.equal(logits(pickle.loads(pickle.dumps(loaded))), logits(loaded))
    loaded.save_pretrained(tmp_path)
    names = [set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])]
    from ptq.formats.checkpoint import CheckpointReader

    names.append(set(CheckpointReader(tmp_path).names()))
    assert names[0] == names[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(loaded))


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_experts_with_biases_and_other_layouts(name, tmp_path):
    """Their parameters are stored otherwise than one tensor an expert; our files hold one for each projection."""
    from test_moe import build

    tiny_models.save(build(name), tmp_path / "parent")
    tiny_models.run(tiny_models.settings(tmp_path / "parent", tmp_path / "ours", "rtn"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = ptq.load(tmp_path / "ours", device="cpu")
    assert packed(loaded) == packed(expected)
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), logits(loaded))


def test_a_packed_head_shares_nothing(tmp_path):
    """A configuration that ties the head to the embedding, beside a head that is packed."""
    model = tiny_models.build("llama", tie_word_embeddings=True)
    head = foreign_files.stored_weight(*model.lm_head.weight.shape, Kind("gptq", writer="ptq:0.1.0"), 5)
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    codec = CODECS["gptq"]
    config = codec.quantization_config({"lm_head": SCHEME}, damping=None, version="0.1.0")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config["dynamic"] = {f"-:{name}": {} for name in linears if name != "lm_head"}
    tensors |= {f"lm_head.{leaf}": tensor for leaf, tensor in head.tensors.items()}
    foreign_files.save(tmp_path, tensors, model.config, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed(loaded) == ["lm_head"]
    assert torch.equal(logits(loaded), logits(ptq.load(tmp_path, device="cpu")))
    assert torch.equal(loaded.lm_head.dequantize(torch.float32), head.dense)


STUB = """
class AutoHfQuantizer:
    @classmethod
    def merge_quantization_configs(cls, settings, arguments=None):
        return "their own"
"""


@pytest.mark.parametrize("first", ["ptq", "transformers.quantizers.auto"])
def test_the_order_of_imports_does_not_matter(first, tmp_path):
    """With a module of that name in transformers' place, because the real one takes seconds to import."""
    stub = tmp_path / "transformers/quantizers/auto.py"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    for folder in (stub.parent, stub.parent.parent):
        (folder / "__init__.py").touch()
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, 'kernels']; import {first}; import ptq; "
        "import transformers.quantizers.auto as auto; merge = auto.AutoHfQuantizer.merge_quantization_configs; "
        "print(merge.__wrapped__.__name__, merge({'quant_method': 'gptq'}, None), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "merge_quantization_configs their own False", done.stderr


def test_installing_twice_wraps_once():
    from transformers.quantizers.auto import AutoHfQuantizer

    before = AutoHfQuantizer.merge_quantization_configs
    install()
    assert AutoHfQuantizer.merge_quantization_configs is before


def test_every_example_of_the_text_runs(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model-4bit").symlink_to(ours[0])
    foreign_files.write(tmp_path / "someone-elses-awq", Kind("awq", symmetric=False))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/load.md").read_text(), re.S)
    assert len(blocks) == 4
    try:
        for block in blocks:
            exec(block, found := {})
            assert len(packed(found["model"])) == 14 if "model" in found else is_ours({"quant_method": "gptq"})
    finally:
        ptq.register(override=False)
    assert (tmp_path / "copy-4bit/config.json").is_file()


def test_the_configuration_describes_itself():
    assert PtqConfig(impl="cpu").to_dict() == {"quant_method": "ptq", "impl": "cpu", "activation": None}
