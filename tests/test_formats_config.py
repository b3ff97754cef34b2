"""quantization_config blocks. Oracle: parse is the reverse of write, readers' own parsers, hand-written blocks."""

import json
import re

import pytest

from ptq.errors import ConfigError, FormatError
from ptq.formats import CODECS, Scheme, codec_for_config, readable_config, schemes_by_module
from ptq.integration import is_ours

S4, S8, A4 = Scheme(4, 128, True), Scheme(8, 32, True), Scheme(4, 128, False)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ATTENTION + MLP] + ["lm_head"]


def schemes_with(default, **changes):
    """A 12-layer model with a float head; changes by name, with __ for the dots."""
    schemes = dict.fromkeys(LINEARS, default) | {"lm_head": None}
    for name, scheme in changes.items():
        schemes[name.replace("__", ".")] = scheme
    return schemes


def write(codec, schemes, damping=0.01):
    config = CODECS[codec].quantization_config(schemes, damping=damping, version="0.1.0")
    return json.loads(json.dumps(config))  # what a reader gets


MIXED = schemes_with(
    S4,
    model__layers__1__mlp__down_proj=S8,  # must not catch layers 10 and 11
    model__layers__0__mlp__gate_proj=None,
    model__layers__0__mlp__up_proj=None,
    model__layers__2__self_attn__q_proj=Scheme(8, -1, True),
)


@pytest.mark.parametrize(
    ("codec", "schemes"),
    [
        ("gptq", schemes_with(S4)),
        ("gptq", schemes_with(Scheme(3, -1, True), lm_head=S8)),
        ("gptq", MIXED),
        ("gptq_v2", schemes_with(A4, model__layers__3__mlp__up_proj=S4)),
        ("gptq_v2", {"fc1": A4, "fc2": None}),
        ("awq", schemes_with(A4)),
        ("awq", schemes_with(S4, model__layers__1__mlp__down_proj=None)),
        ("awq", schemes_with(A4, lm_head=A4)),
        ("compressed-tensors", schemes_with(S4)),
        ("compressed-tensors", MIXED),
        ("compressed-tensors", schemes_with(Scheme(5, -1, False), lm_head=S8)),
    ],
)
def test_parse_is_the_reverse_of_write(codec, schemes):
    config = write(codec, schemes)
    assert codec_for_config(config) is CODECS[codec]
    assert CODECS[codec].parse_config(config, schemes) == schemes


@pytest.mark.parametrize("codec", list(CODECS))
def test_nothing_to_quantize_is_an_error(codec):
    with pytest.raises(ConfigError, match="at least one quantized Linear, found none among 1"):
        write(codec, {"lm_head": None})


def test_gptq_block_is_literal():
    assert write("gptq", schemes_with(S4)) == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32", "lm_head": False,
        "static_groups": True, "true_sequential": True, "damp_percent": 0.01, "dynamic": {},
        "modules_in_block_to_quantize": None, "quantizer": ["ptq:0.1.0"],
    }  # fmt: skip
    assert "damp_percent" not in write("gptq_v2", schemes_with(A4), damping=None)


@pytest.mark.parametrize(
    ("codec", "schemes", "handed_on"),
    [("gptq", schemes_with(S4), True), ("gptq", MIXED, False), ("gptq", {**schemes_with(S4), "lm_head": S4}, False),
     ("gptq_v2", schemes_with(A4), False)],
    ids=["uniform", "mixed", "head", "v2"],
)  # fmt: skip
def test_auto_round_gets_what_it_reads_as_it_is_meant(codec, schemes, handed_on):
    """It knows v1, one scheme and a float head. Oracle: transformers' own `AutoRoundConfig`."""
    from transformers import AutoRoundConfig

    config = write(codec, schemes)
    assert is_ours(config)
    if handed_on:
        assert AutoRoundConfig.from_dict(config).packing_format == "auto_round:gptq"
    else:
        with pytest.raises(NotImplementedError, match="gptqv1"):
            AutoRoundConfig.from_dict(config)


def test_awq_block_is_literal():
    assert write("awq", schemes_with(S4, model__layers__1__mlp__down_proj=None)) == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "lm_head": False,
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head"],
        "meta": {"quantizer": ["ptq:0.1.0"], "symmetric": True},
    }  # fmt: skip


def test_compressed_tensors_block_is_literal():
    weights = {"type": "int", "symmetric": True, "dynamic": False}
    assert write("compressed-tensors", MIXED) == {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "num_bits": 4, "strategy": "group", "group_size": 128},
            },
            "group_1": {
                "targets": ["model.layers.1.mlp.down_proj"],
                "weights": {**weights, "num_bits": 8, "strategy": "group", "group_size": 32},
            },
            "group_2": {
                "targets": ["model.layers.2.self_attn.q_proj"],
                "weights": {**weights, "num_bits": 8, "strategy": "channel"},
            },
        },
        "ignore": [
            "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head", "model.layers.0.mlp.gate_up_proj"
        ],
        "kv_cache_scheme": None, "global_compression_ratio": None, "version": "0.20.0",
        "meta": {"quantizer": ["ptq:0.1.0"]},
    }  # fmt: skip


def test_a_packed_head_is_named_to_compressed_tensors():
    """vLLM loads no head of the class alone, and beside a tower its head is ``language_model.lm_head``."""
    schemes = {**schemes_with(S4), "lm_head": S4}
    config = write("compressed-tensors", schemes)
    kind, head = config["config_groups"]["group_0"]["targets"]
    assert kind == "Linear"
    names = ("lm_head", "language_model.lm_head", "my_lm_head", "lm_head.proj")
    assert [bool(re.match(head.removeprefix("re:"), name)) for name in names] == [True, True, False, False]
    assert CODECS["compressed-tensors"].parse_config(config, schemes) == schemes


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def packed(weights=(), group=(), targets=("Linear",), **top):
    group = {"targets": list(targets), "weights": WEIGHTS | dict(weights), **dict(group)}
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {**block, **top}


@pytest.mark.parametrize(
    ("config", "codec"),
    [
        (GPTQ, "gptq"),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        (GPTQ | {"format": "GPTQ_V2"}, "gptq_v2"),
        (AWQ, "awq"),
        (AWQ | {"version": None, "checkpoint_format": "gemm"}, "awq"),
        (packed(), "compressed-tensors"),
        (packed(format="mixed-precision", group={"format": "pack-quantized"}), "compressed-tensors"),
    ],
)
def test_codec_is_picked_by_method_and_layout(config, codec):
    assert codec_for_config(config).name == codec
    assert CODECS[codec].parse_config(config, ["layers.0.fc"])["layers.0.fc"].bits == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"quant_method must name a format that is read \(gptq: gptq, gptq_v2; awq: gemm; .*found 'none'"),
        ({"quant_method": "bitsandbytes"}, "found 'bitsandbytes'"),
        (GPTQ | {"checkpoint_format": "marlin"}, "must be one that is read .*found marlin"),
        (GPTQ | {"checkpoint_format": "gptq_v2", "format": "gptq"}, "found gptq, gptq_v2"),
        (AWQ | {"version": "gemv"}, "found gemv"),
        (packed(format="nvfp4-pack-quantized"), "found nvfp4-pack-quantized"),
    ],
)
def test_unknown_layouts_are_named(config, message):
    with pytest.raises(FormatError, match=message):
        codec_for_config(config)


@pytest.mark.parametrize(
    ("config", "name", "scheme"),
    [
        (GPTQ, "model.layers.0.fc", S4),
        (GPTQ | {"desc_act": True, "sym": False}, "model.layers.0.fc", A4),
        (GPTQ, "lm_head", None),
        (GPTQ | {"lm_head": True}, "lm_head", S4),
        (GPTQ | {"dynamic": {r".*\.fc": {"bits": 8}}}, "model.layers.0.fc", Scheme(8, 128, True)),
        (GPTQ | {"dynamic": {r".*\.fc": {"bits": 8}}}, "model.layers.0.other", S4),
        (GPTQ | {"dynamic": {r"-:.*\.fc": {}, r"+:.*\.fc": {"bits": 8}}}, "model.layers.0.fc", None),
        (GPTQ | {"dynamic": None}, "model.layers.0.fc", S4),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.fc"], ["attn.q"]]}, "model.layers.0.attn.q", S4),
        (GPTQ | {"modules_in_block_to_quantize": ["mlp.fc"]}, "model.layers.0.attn.q", None),
        (AWQ, "model.layers.0.fc", A4),
        (AWQ, "lm_head", None),
        ({"w_bit": 4, "q_group_size": 64}, "model.layers.0.fc", Scheme(4, 64, False)),
        (AWQ | {"modules_to_not_convert": ["gate"]}, "model.layers.0.mlp.gate", None),
        (AWQ | {"modules_to_not_convert": ["gate"]}, "model.layers.0.mlp.gate_proj", A4),
        (AWQ | {"modules_to_not_convert": ["mlp.gate"]}, "model.layers.0.mlp.gate_proj", A4),
        (AWQ | {"modules_to_not_convert": ["visual"]}, "visual.blocks.0.fc", None),
        (packed(), "lm_head", S4),
        (packed(ignore=["lm_head"]), "lm_head", None),
        (packed(ignore=["re:.*gate$"]), "model.layers.0.mlp.gate", None),
        (packed(ignore=["re:.*gate$"]), "model.layers.0.mlp.gate_proj", S4),
        (packed(weights={"strategy": "channel", "group_size": None}), "fc", Scheme(4, -1, True)),
        (packed(weights={"strategy": "channel", "group_size": -1}), "fc", Scheme(4, -1, True)),
        (packed(weights={"strategy": None}), "fc", S4),
        (packed(weights={"strategy": None, "group_size": None}), "fc", Scheme(4, -1, True)),
        (packed(weights={"actorder": "static", "symmetric": False}), "fc", A4),
        (packed(targets=["re:.*self_attn.*"]), "model.layers.0.mlp.fc", None),
        (packed(targets=["re:.*self_attn.*"]), "model.layers.0.self_attn.q_proj", S4),
    ],
)
def test_other_writers_spellings(config, name, scheme):
    codec = CODECS["awq"] if "w_bit" in config else codec_for_config(config)
    assert codec.parse_config(config, [name]) == {name: scheme}


def test_most_specific_target_wins_whatever_the_order():
    weights = {bits: WEIGHTS | {"num_bits": bits} for bits in (2, 4, 8)}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": weights[4]},
        "group_1": {"targets": ["re:.*down_proj"], "weights": weights[8]},
        "group_2": {"targets": ["layers.1.down_proj"], "weights": weights[2]},
    }
    names = ["layers.0.up_proj", "layers.0.down_proj", "layers.1.down_proj"]
    for order in (list(groups), list(reversed(groups))):
        parsed = CODECS["compressed-tensors"].parse_config(
            {**packed(), "config_groups": {k: groups[k] for k in order}}, names
        )
        assert [parsed[name].bits for name in names] == [4, 8, 2]


W1, W2, ROUTER = (f"layers.0.moe.{leaf}" for leaf in ("experts.0.w1", "experts.0.w2", "gate"))
SPELLED = {"layers.0.mlp.experts.0.gate_proj": W1, "layers.0.mlp.experts.0.down_proj": W2, "layers.0.mlp.gate": ROUTER}
EIGHT = packed()["config_groups"]["group_0"] | {"weights": WEIGHTS | {"num_bits": 8}}


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (packed(targets=["Linear"]), (4, 4, 4)),
        *(
            (
                packed() | {"config_groups": packed()["config_groups"] | {"group_1": EIGHT | {"targets": [target]}}},
                (4, 8, 4),
            )
            for target in (W2, "re:.*w2$", "re:.*down_proj$", "layers.0.mlp.experts.0.down_proj")
        ),
        (packed(targets=[r"re:.*\.w\d"]), (4, 4, None)),
        (packed(targets=[r"re:.*\.w\d", "Linear"], ignore=[r"re:.*\.gate$"]), (4, 4, None)),
        # meant for the router, as the file spells it: gate_proj is w1 there
        (packed(targets=[r"re:.*\.w\d"], ignore=["re:.*gate"]), (4, 4, None)),
        (GPTQ | {"dynamic": {r"+:.*w2$": {"bits": 8}, "-:.*moe.gate": {}}}, (4, 8, 4)),
        (GPTQ | {"dynamic": {r"+:.*down_proj$": {"bits": 8}}}, (4, 8, 4)),
        (GPTQ | {"modules_in_block_to_quantize": [["experts.0.w1", "experts.0.down_proj"]]}, (4, 4, None)),
        (AWQ | {"modules_to_not_convert": ["gate"]}, (4, 4, None)),
    ],
)
def test_rules_in_the_words_of_the_file(config, bits):
    """Experts of Mixtral: transformers says down_proj, the file w2. A rule for either beats what holds for all."""
    found = schemes_by_module(codec_for_config(config), config, SPELLED)
    assert tuple(found[name].bits if name in found else None for name in SPELLED) == bits


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPTQ, "bits": 5}, "holds 2, 3, 4, 8 bits, the config says 5"),
        ({**GPTQ, "bits": "4"}, "bits in the quantization config must be int, found '4'"),
        ({**GPTQ, "group_size": 0}, "group_size in the quantization config must be -1 or positive, found 0"),
        ({"quant_method": "gptq", "bits": 4}, "needs group_size, found only"),
        (GPTQ | {"sym": "yes"}, "sym in the quantization config must be bool, found 'yes'"),
        (GPTQ | {"pack_dtype": "int16"}, "read as int32, the config says pack_dtype 'int16'"),
        (GPTQ | {"dynamic": {"-:(": {}}}, "must be a regular expression"),
        (GPTQ | {"dynamic": ["-:lm_head"]}, "`dynamic` .* must map patterns to settings"),
        (GPTQ | {"dynamic": {"fc": {"bits": 7}}}, "the config says 7"),
        (AWQ | {"w_bit": 8}, "contradicts itself: {'bits': 4, 'w_bit': 8}"),
        (AWQ | {"bits": 3}, "holds 4 bits, the config says 3"),
        (packed(config_groups={}), "needs config_groups, found {}"),
        (packed(quantization_status="calibration"), "must be 'compressed', found 'calibration'"),
        (packed(kv_cache_scheme={"num_bits": 8}), "needs kv_cache_scheme, which is not read"),
        (packed(transform_config={"config_groups": {"u": {}}}), "needs transform_config"),
        (packed(group={"format": "int-quantized"}), "group_0 .*found {'format': 'int-quantized'}"),
        (packed(group={"input_activations": {"num_bits": 8}}), "found {'activations': .'input_activations'.}"),
        (packed(group={"weights": None}), "found no weights"),
        (packed(weights={"type": "float"}), "found {'type': 'float'}"),
        (packed(weights={"actorder": "sideways"}), "found {'actorder': 'sideways'}"),
        (packed(weights={"dynamic": True}), "found {'dynamic': True}"),
        (
            packed(weights={"strategy": "block"}),
            "strategy 'channel', or 'group' with a group_size, found 'block' with 128",
        ),
        (packed(weights={"group_size": None}), "found 'group' with None"),
        (packed(ignore=["re:("]), "must be a regular expression"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config, message):
    with pytest.raises(FormatError, match=message):
        codec_for_config(config).parse_config(config, ["fc"])


ROUND = GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
WRONG = {
    "str": [*(GPTQ | {key: [5]} for key in ("quant_method", "checkpoint_format", "format")), AWQ | {"version": 5},
            packed(format=5), ROUND | {"packing_format": [5]}],
    "dict": [GPTQ | {"meta": "x"}, GPTQ | {"meta": [1]}, GPTQ | {"dynamic": {"+:.*": 5}}, AWQ | {"meta": 5},
             packed(config_groups={"a": 5}), packed(group={"weights": 5}), ROUND | {"extra_config": 5},
             ROUND | {"extra_config": {"lm_head": 5}}, ROUND | {"extra_config": {"lm_head": None}}],
    "bool": [GPTQ | {"desc_act": "x"}, GPTQ | {"lm_head": "x"}, AWQ | {"zero_point": "x"}, AWQ | {"lm_head": 2}],
    "int": [ROUND | {"extra_config": {"fc": {"bits": "8"}}}],
    "list": [AWQ | {"modules_to_not_convert": "fc"}, packed(ignore=5), packed(group={"targets": 5}),
             GPTQ | {"modules_in_block_to_quantize": 5}],
    "names": [AWQ | {"modules_to_not_convert": [5]}, packed(ignore=[5]), packed(group={"targets": [5]}),
              GPTQ | {"modules_in_block_to_quantize": [[5]]}],
}  # fmt: skip


def test_other_ways_to_write_the_same():
    """Numbers for bools, and tuples of a configuration that was made in Python."""
    config = AWQ | {"zero_point": 1, "modules_to_not_convert": ("fc",)}
    assert codec_for_config(config).parse_config(config, ["fc", "b"]) == codec_for_config(config).parse_config(
        AWQ | {"zero_point": True, "modules_to_not_convert": ["fc"]}, ["fc", "b"]
    )


@pytest.mark.parametrize(("kind", "config"), [(kind, config) for kind, every in WRONG.items() for config in every])
def test_values_of_another_type_are_named(kind, config):
    wanted = "list names, found 5 in it" if kind == "names" else f"be {kind}, found"
    with pytest.raises(FormatError, match=rf"\S+ in the quantization config must {wanted}"):
        codec_for_config(readable_config(config)).parse_config(readable_config(config), ["fc"])


@pytest.mark.parametrize(
    ("codec", "reader", "schemes"),
    [
        ("gptq", "GPTQConfig", MIXED),
        ("gptq_v2", "GPTQConfig", schemes_with(A4)),
        ("awq", "AwqConfig", schemes_with(S4)),
        ("compressed-tensors", "CompressedTensorsConfig", MIXED),
    ],
)
def test_transformers_parses_what_we_write(codec, reader, schemes):
    if codec == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    from transformers.utils import quantization_config as readers

    config = write(codec, schemes)
    parsed = getattr(readers, reader).from_dict(dict(config))
    assert parsed.quant_method.value == config["quant_method"]
    if codec == "compressed-tensors":
        groups = parsed.quantization_config.config_groups.values()
        assert [(g.weights.num_bits, g.weights.group_size) for g in groups] == [(4, 128), (8, 32), (8, None)]
        assert parsed.quantization_config.ignore == config["ignore"]
        return
    assert (parsed.bits, parsed.group_size) == (4, 128)
    assert parsed.format == config.get("format", "gemm")
    assert getattr(parsed, "modules_to_not_convert", ["lm_head"]) == ["lm_head"]
    # What transformers would save again still says the same to us.
    rewritten = codec_for_config(parsed.to_dict())
    assert rewritten is CODECS[codec]
