"""Which tensor gets which block format, and what the file says of a model.

Oracles: the table of kinds that llama.cpp's own quantizer gave an 8-layer model (recorded from llama-cpp-python
0.3.36), and the published definition of Llama 3's rotary scaling.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ptq.errors import ConfigError, UnsupportedModelError
from ptq.gguf.layout import describe_model, paired_rows, rope_factors, targets
from ptq.gguf.mix import FILE_TYPES, Place, file_type, kind_of, wanted_kind


def place(name: str, block: int = 2, columns: int = 256, blocks: int = 8, **changes: bool) -> Place:
    usual = {"is_head": False, "shares_values": False}
    return Place(f"blk.{block}.{name}.weight", columns, block, blocks, **{**usual, **changes})


@pytest.mark.parametrize(("type_name", "usual"), [("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")])
def test_mixed_types_favour_some_layers(type_name, usual):
    file = file_type(type_name)
    for name in ("attn_v", "ffn_down"):
        assert [block for block in range(8) if kind_of(file, place(name, block)) == "Q6_K"] == [0, 3, 6, 7]
    assert {kind_of(file, place(name)) for name in ("attn_q", "attn_output", "ffn_gate", "attn_v")} == {usual}


# Layers with more bits of a 32-layer model (Llama-3-8B), as published Q4_K_M files of it have them.
def test_favoured_layers_of_a_32_layer_model():
    file = file_type("Q4_K_M")
    favoured = [b for b in range(32) if kind_of(file, place("ffn_down", b, blocks=32)) == "Q6_K"]
    assert favoured == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize(
    ("type_name", "columns", "kind"),
    [("Q4_K_M", 256, "Q6_K"), ("Q4_0", 256, "Q6_K"), ("Q8_0", 256, "Q8_0"), ("Q4_K_M", 320, "Q8_0"),
     ("Q4_0", 320, "Q8_0"), ("F16", 256, "F16"), ("Q8_0", 40, "F16")],
)  # fmt: skip
def test_the_head_gets_more_bits(type_name, columns, kind):
    assert kind_of(file_type(type_name), place("output", columns=columns, is_head=True)) == kind


@pytest.mark.parametrize(
    ("type_name", "name", "kind"),
    [
        ("Q4_K_M", "attn_q", "Q5_0"),
        ("Q5_K_M", "attn_q", "Q5_1"),
        ("Q6_K", "attn_q", "Q8_0"),
        ("Q4_0", "attn_q", "Q4_0"),
    ],
)
def test_rows_that_are_no_multiple_of_256_fall_back(type_name, name, kind):
    assert kind_of(file_type(type_name), place(name, columns=384)) == kind
    assert kind_of(file_type(type_name), place(name, columns=40)) == "F16"
    assert wanted_kind(file_type(type_name), place(name, columns=384)) == FILE_TYPES[type_name].kind


def test_values_shared_by_eight_heads_get_more_bits():
    assert kind_of(file_type("Q4_K_M"), place("attn_v", 11, blocks=80, shares_values=True)) == "Q5_K"


@pytest.mark.parametrize("name", ["q4_0", "Q4_0", "q4_k_m", "f16"])
def test_a_type_may_be_in_small_letters(name):
    assert file_type(name) is FILE_TYPES[name.upper()]


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match=r"--type must be one of F16, Q4_0, .*; found 'Q3_K'"):
        file_type("Q3_K")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


def test_rope_factors_are_those_transformers_divides_by():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        rope_parameters=LLAMA3, hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 128, 2).float() / 128)
    torch.testing.assert_close(plain / rope_factors(LLAMA3, 128), scaled, rtol=1e-5, atol=0)  # float32 powers
    assert "llama.rope.freq_base" in describe_model(config).keys
    assert describe_model(config).rope_factors is not None


def test_keys_of_a_model():
    config = Qwen3Config(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
                         num_key_value_heads=2, head_dim=64, vocab_size=8192, max_position_embeddings=1024,
                         rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e4})  # fmt: skip
    found = describe_model(config)
    assert (found.architecture, found.paired_rows, found.notes) == ("qwen3", False, ())
    assert found.keys == {
        "qwen3.context_length": 1024, "qwen3.embedding_length": 256, "qwen3.block_count": 4,
        "qwen3.feed_forward_length": 512, "qwen3.attention.head_count": 6, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 64, "qwen3.attention.value_length": 64,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6, "qwen3.vocab_size": 8192, "qwen3.rope.freq_base": 1e4,
    }  # fmt: skip


def test_linear_scaling_of_positions_is_a_key():
    config = LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    keys = describe_model(config).keys
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_a_sliding_window_becomes_the_context():
    found = describe_model(MistralConfig(sliding_window=4096, max_position_embeddings=32768))
    assert found.keys["llama.context_length"] == 4096
    assert "its context is cut to the window, 4096" in found.notes[0]


@pytest.mark.parametrize(("full", "context", "notes"), [(1, 64, 1), (2, 512, 0)])
def test_a_window_that_no_layer_slides_cuts_nothing(full, context, notes):
    """Qwen2 slides it from layer ``max_window_layers`` on, here the second of two, or none."""
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=64, max_window_layers=full,
                         max_position_embeddings=512)  # fmt: skip
    found = describe_model(config)
    assert (found.keys["qwen2.context_length"], len(found.notes)) == (context, notes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SimpleNamespace(model_type="gemma2"), "knows llama, mistral, qwen2, qwen3; the model is gemma2"),
        (Qwen2Config(hidden_act="gelu"), "has the activation silu; the model's is gelu"),
        (LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                      "original_max_position_embeddings": 2048}), "default, linear and llama3"),
    ],
)  # fmt: skip
def test_models_without_a_counterpart_are_refused(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        describe_model(config)


def test_a_parameter_without_a_tensor_is_refused():
    model = describe_model(LlamaConfig(num_hidden_layers=2))
    with pytest.raises(UnsupportedModelError, match=r"no tensor for model\.layers\.0\.extra\.weight"):
        targets(model, [("model.layers.0.extra.weight", (4, 4))], file_type("F16"), tied=False)


def test_pairs_of_rows_stand_together():
    """Head 0 has rows 0 to 3: pairs (0, 2) and (1, 3); head 1 likewise."""
    assert paired_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
