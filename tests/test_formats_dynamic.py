"""The `dynamic` rules of GPTQ files, as readers look Linears up. Oracle: the schemes that were written."""

import json
import re

import pytest

from ptq.formats import CODECS
from ptq.formats.codec import Scheme

S4, S8, CODEC = Scheme(4, 128, True), Scheme(8, 32, True), CODECS["gptq"]
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write(schemes):
    return json.loads(json.dumps(CODEC.quantization_config(schemes, damping=None, version="0.1.0")))


def engine_decision(config, name):
    """How vLLM, SGLang and gptqmodel look a module up: the first rule that `re.match`es its (fused) name."""
    for rule, override in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else override
    return {}


def test_gptq_rules_cover_fused_modules_and_nothing_else():
    schemes = {f"model.layers.{i}.{leaf}": S4 for i in range(12) for leaf in LEAVES}
    schemes |= {"model.layers.1.mlp.down_proj": S8}  # must not catch layers 10 and 11
    schemes |= {"model.layers.0.mlp.gate_proj": None, "model.layers.0.mlp.up_proj": None}
    schemes |= {"model.layers.2.self_attn.q_proj": S8, "lm_head": None}
    config = write(schemes)
    layer = "model.layers.{}.{}".format
    for leaf in ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"):
        assert engine_decision(config, layer(0, leaf)) is None
    assert engine_decision(config, layer(1, "mlp.down_proj")) == {"bits": 8, "group_size": 32, "sym": True}
    for untouched in (layer(10, "mlp.gate_proj"), layer(11, "mlp.down_proj"), layer(2, "self_attn.qkv_proj")):
        assert engine_decision(config, untouched) == {}
    assert len(config["dynamic"]) == 3


def test_gptq_experts_of_a_layer_share_one_rule():
    experts = {f"model.layers.0.mlp.experts.{e}.{leaf}_proj": S8 for e in range(3) for leaf in ("gate", "up", "down")}
    dense = {f"model.layers.{i}.self_attn.o_proj": S4 for i in range(20)}
    schemes = {**dense, **experts, "model.layers.0.mlp.gate": None}
    config = write(schemes)
    assert list(config["dynamic"]) == [
        r"+:^model\.layers\.0\.mlp\.experts(?:\..*)?$",
        r"-:^model\.layers\.0\.mlp\.gate$",
    ]
    assert engine_decision(config, "model.layers.0.mlp.experts")["bits"] == 8
    assert CODEC.parse_config(config, schemes) == schemes
    uneven = {**schemes, "model.layers.0.mlp.experts.1.down_proj": S4}
    assert CODEC.parse_config(write(uneven), uneven) == uneven


TOWERS = ("model.vision_tower.encoder", "vision_tower.vision_model.encoder")  # as transformers and as the file has it


@pytest.mark.parametrize("kept", [[], [f"{tower}.layers.0.self_attn.{leaf}" for tower in TOWERS for leaf in "qkv"]])
def test_gptq_rules_reach_a_decoder_beside_a_tower_under_the_engines_name(kept):
    """vLLM's ``language_model.model`` is what neither transformers nor the files say."""
    kept = [f"{name}_proj" for name in kept] + [f"{tower}.layers.1.mlp.fc1" for tower in TOWERS]
    schemes = {f"model.language_model.layers.{i}.self_attn.{leaf}_proj": S8 if i == 0 else S4
               for i in range(11) for leaf in "qkvo"}  # fmt: skip
    schemes |= {"model.language_model.layers.1.self_attn.o_proj": None, "lm_head": S8, **dict.fromkeys(kept)}
    config = write(schemes)
    for names in (["model.language_model"], ["language_model.model", "model"]):
        for layer, leaf, bits in ((0, "qkv_proj", 8), (0, "o_proj", 8), (1, "qkv_proj", None), (10, "qkv_proj", None)):
            for name in names:
                found = engine_decision(config, f"{name}.layers.{layer}.self_attn.{leaf}")
                assert (found or {}).get("bits") == bits, name
    assert engine_decision(config, "language_model.model.layers.1.self_attn.o_proj") is None
    assert engine_decision(config, "language_model.lm_head")["bits"] == 8
    assert all(engine_decision(config, name) is None for name in kept)
    fused = [name.replace("q_proj", "qkv_proj") for name in kept if name.endswith("q_proj")]
    assert all(engine_decision(config, name) is None for name in fused)
    by_name = {**config, "dynamic": dict(sorted(config["dynamic"].items()))}  # as transformers saves it again
    assert CODEC.parse_config(by_name, schemes) == schemes


@pytest.mark.parametrize("scheme", [S4, None])
def test_gptq_rules_of_two_decoders_name_them(scheme):
    """What one has in float or another width the other may have packed; an ending alone would mean both."""
    schemes = {f"{path}.layers.{i}.fc": S4 for path in ("talker", "thinker") for i in range(3)}
    schemes |= {"talker.layers.0.fc": S8, "thinker.layers.0.fc": scheme, "talker.layers.1.fc": None}
    config = write(schemes)
    assert CODEC.parse_config(config, schemes) == schemes
    by_name = {**config, "dynamic": dict(sorted(config["dynamic"].items()))}
    assert CODEC.parse_config(by_name, schemes) == schemes
