"""Checkpoints of other writers, loaded with `ptq.load` and through transformers.

Oracle: a dense model with the weights that the files mean, computed beside the packing with Python integers.
"""

import json

import foreign_files
import pytest
import torch
from foreign_files import Kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build, run, save, settings
from transformers import AutoModelForCausalLM

import ptq
from ptq.errors import FormatError
from ptq.formats import readable_config
from ptq.integration.quantizer import PtqConfig
from ptq.nn.linear import QuantLinear

CT = "compressed-tensors"
KINDS = [
    Kind("gptq", 4),
    Kind("gptq", 4, ordered=True),
    Kind("gptq", 2, ordered=True),
    Kind("gptq", 3, ordered=True),
    Kind("gptq", 8, -1),
    Kind("gptq", 4, symmetric=False),
    Kind("gptq", 4, symmetric=False, writer="gptqmodel:7.6.0"),
    Kind("gptq", 2, symmetric=False, writer="gptqmodel:7.6.0", ordered=True),
    Kind("gptq", 3, symmetric=False, writer="gptqmodel:7.6.0"),
    Kind("gptq", 8, symmetric=False, writer="gptqmodel:7.6.0"),
    Kind("gptq_v2", 3, symmetric=False, ordered=True),
    Kind("awq", 4, symmetric=False),
    Kind(CT, 4),
    Kind(CT, 4, ordered=True),
    Kind(CT, 3, symmetric=False, ordered=True),
    Kind(CT, 8, -1, symmetric=False),
    Kind("gptq_v2", 2, symmetric=False, auto_round=True),
    Kind("gptq", 4, auto_round=True),
    Kind("awq", 4, symmetric=False, auto_round=True),
]


def name_of(kind: Kind) -> str:
    return " ".join(str(part) for part in kind)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_load(tmp_path, kind):
    model = foreign_files.write(tmp_path, kind)
    loaded = ptq.load(tmp_path, device="cpu", impl="reference")
    layer = loaded.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    assert (layer.perm is not None) == kind.ordered
    assert torch.equal(layer.dequantize(torch.float32), model.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(foreign_files.logits(loaded), foreign_files.logits(model), **foreign_files.CLOSE)


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[11], KINDS[14], KINDS[16]], ids=name_of)
def test_from_pretrained_by_request_and_what_it_saves(tmp_path, kind):
    """The saved files hold the same tensors and configuration: any reader of the format reads the copy."""
    foreign_files.write(tmp_path / "theirs", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", quantization_config=PtqConfig())
    expected = foreign_files.logits(ptq.load(tmp_path / "theirs", device="cpu"))
    assert torch.equal(foreign_files.logits(model), expected)
    model.save_pretrained(tmp_path / "copy", max_shard_size="60KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    theirs, copy = ({n: t for file in (tmp_path / d).glob("*.safetensors") for n, t in load_file(file).items()}
                    for d in ("theirs", "copy"))  # fmt: skip
    assert set(copy) == set(theirs)
    assert [n for n in theirs if not torch.equal(copy[n], theirs[n]) or copy[n].dtype != theirs[n].dtype] == []
    settings = [
        json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in ("theirs", "copy")
    ]
    assert settings[0] == settings[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", quantization_config=PtqConfig())
    assert torch.equal(foreign_files.logits(again), expected)


def test_scales_are_saved_in_the_dtype_they_had(tmp_path):
    parent = save(build("llama", torch.bfloat16), tmp_path / "parent")
    run(settings(parent, tmp_path / "made", "rtn", format=CT))
    ptq.load(tmp_path / "made", device="cpu").save_pretrained(tmp_path / "copy")
    made, copy = (load_file(tmp_path / d / "model.safetensors") for d in ("made", "copy"))
    assert torch.bfloat16 in {tensor.dtype for name, tensor in made.items() if name.endswith("weight_scale")}
    assert {name: tensor.dtype for name, tensor in copy.items()} == {
        name: tensor.dtype for name, tensor in made.items()
    }


def test_asymmetric_v1_is_saved_as_v2(tmp_path):
    foreign_files.write(tmp_path / "theirs", KINDS[6])
    model = ptq.load(tmp_path / "theirs", device="cpu")
    expected = foreign_files.logits(model)
    model.save_pretrained(tmp_path / "copy")
    settings = json.loads((tmp_path / "copy/config.json").read_text())["quantization_config"]
    assert settings["checkpoint_format"] == settings["format"] == "gptq_v2"
    assert torch.equal(foreign_files.logits(ptq.load(tmp_path / "copy", device="cpu")), expected)


def change(directory, name, new):
    """Replace one tensor of a checkpoint, or take it out (None)."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"].get(name, "model-00001-of-00002.safetensors")
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    old = tensors.pop(name, None)
    index["weight_map"].pop(name, None)
    if new is not None:
        tensors[name] = new(old)
        index["weight_map"][name] = file.name
    save_file(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def load(directory):
    return ptq.load(directory, device="cpu")


def by_request(directory):
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=PtqConfig())


DOWN, GATE = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("way", [load, by_request])
@pytest.mark.parametrize(
    ("kind", "name", "new", "message"),
    [
        (Kind("gptq"), f"{DOWN}.qzeros", None, f"tensor {DOWN}.qzeros is missing"),
        (Kind("gptq"), f"{DOWN}.qweight", torch.Tensor.float, f"{DOWN}.qweight: expected torch.int32 .*float32"),
        (Kind("gptq"), f"{DOWN}.scales", lambda t: t[:1], rf"{DOWN}.scales: expected shape \[4, 64\], found \[1, 64\]"),
        (Kind("gptq"), f"{GATE}.g_idx", lambda t: t + 1, rf"{GATE}.g_idx: groups must be 0..1.* found 1..2"),
        (Kind("gptq"), f"{GATE}.g_idx", lambda t: t * 0, rf"{GATE}.g_idx: every group must have 32 columns.*0 has 64"),
        (Kind("gptq"), f"{GATE}.weight", lambda t: torch.zeros(128, 64), f"{GATE} must be packed or in float.*as well"),
        (Kind("gptq"), "model.layers.0.input_layernorm.weight", None, "input_layernorm.weight is missing"),
        (Kind(CT, ordered=True), f"{DOWN}.weight_g_idx", lambda t: t.float(), "weight_g_idx: expected torch.int32 or"),
        (Kind(CT), f"{DOWN}.weight_shape", lambda t: t.flip(0), f"{DOWN}.weight_packed: expected shape"),
        (Kind(CT), f"{DOWN}.weight_zero_point", lambda _: torch.ones(8, 4), f"{DOWN} is symmetric by .* no zero point"),
    ],
)  # fmt: skip
def test_damaged_tensors(tmp_path, kind, name, new, message, way):
    foreign_files.write(tmp_path, kind)
    change(tmp_path, name, new)
    with pytest.raises(FormatError, match=message):
        way(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Kind("gptq"), {"bits": 5}, "holds 2, 3, 4, 8 bits, the config says 5"),
        (Kind(CT, 5), {}, "has 5 bits; weights of 2, 3, 4, 8 bits can be run"),
        (Kind("gptq"), {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        (Kind("gptq"), {"checkpoint_format": "marlin"}, "found marlin"),
        (Kind("gptq"), {"dynamic": {r"-:.*down_proj": {}}}, f"{DOWN} must be packed or in float.*no scheme"),
        (Kind("gptq"), {"dynamic": {r"-:.*": {}}}, "the file holds none for this model's Linears"),
        (Kind(CT), {"kv_cache_scheme": {"num_bits": 8}}, "needs kv_cache_scheme"),
        (Kind(CT, ordered=True), {"quantization_status": "frozen"}, "quantization_status must be .* found 'frozen'"),
        (Kind("gptq", auto_round=True), {"packing_format": "auto_round:exllama"}, "found 'auto_round:exllama'"),
        (Kind("gptq", auto_round=True), {"act_bits": 8}, "act_bits of an auto-round checkpoint must be 16, found 8"),
        (Kind("gptq", auto_round=True), {"data_type": "mx_fp"}, "data_type of an auto-round .* 'int', found 'mx_fp'"),
    ],
)
def test_configurations_that_cannot_be_honoured(tmp_path, kind, changes, message):
    foreign_files.write(tmp_path, kind, **changes)
    with pytest.raises(FormatError, match=message):
        ptq.load(tmp_path, device="cpu")


def test_zero_points_that_are_zero_are_what_symmetric_says(tmp_path):
    model = foreign_files.write(tmp_path, Kind(CT))
    change(tmp_path, f"{DOWN}.weight_zero_point", lambda _: torch.zeros(64, 4, dtype=torch.int8))
    torch.testing.assert_close(foreign_files.logits(load(tmp_path)), foreign_files.logits(model), **foreign_files.CLOSE)


def test_an_order_that_the_file_does_not_have_is_missed(tmp_path):
    foreign_files.write(tmp_path, Kind(CT))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="actorder 'group' in group_0 of config_groups needs weight_g_idx"):
        ptq.load(tmp_path, device="cpu")


def test_auto_round_rules_in_the_words_of_gptq_and_awq():
    """By hand: exact names before patterns, 16 bits is float, a head that is packed is announced."""
    rules = {r".*v_proj": {"bits": 8}, "a.o_proj": {"bits": 16}, "lm_head": {"bits": 4, "group_size": 32, "sym": None}}
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": False, "extra_config": rules}
    assert readable_config({**base, "packing_format": "auto_round"}) == {
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 64, "sym": False,
        "lm_head": True,
        "dynamic": {r"-:^a\.o_proj$": {}, r"+:^lm_head$": {"bits": 4, "group_size": 32}, "+:.*v_proj": {"bits": 8}},
    }  # fmt: skip
    awq = {**base, "packing_format": "auto_round:auto_awq"}
    assert readable_config({**awq, "extra_config": {"a.o_proj": {"bits": 16}}})["modules_to_not_convert"] == [
        "a.o_proj"
    ]
    with pytest.raises(FormatError, match=r"extra_config of an AWQ .* lm_head has \{'bits': 4"):
        readable_config(awq)
