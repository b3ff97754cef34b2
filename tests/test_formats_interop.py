"""compressed-tensors against the library of that name, and whole checkpoints loaded by stock transformers.

Oracle: the library's own pack and unpack functions; a dense model that holds our dequantized weights. The difference of
logits must be exactly 0: transformers expands the codes to the same dense weights and runs the same operations.
"""

import json

import pytest
import torch
from format_examples import random_weight

from ptq.formats import CODECS, Scheme
from ptq.formats.bitpack import pack_stream, unpack_stream
from ptq.formats.checkpoint import CheckpointReader, ShardWriter

pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [33, 96, 100])
def test_the_library_packs_the_same_words(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    quantized = random_weight(24, columns, bits, -1, symmetric=False)
    signed = (quantized.codes.int() - (1 << (bits - 1))).to(torch.int8)
    for dim, codes in ((1, quantized.codes), (0, quantized.codes.t())):
        words = pack_stream(codes, bits)
        theirs = pack_to_int32(signed, bits, packed_dim=dim)
        assert torch.equal(words if dim else words.t(), theirs)
        back = unpack_from_int32(theirs, bits, signed.shape, packed_dim=dim)
        mine = unpack_stream(theirs if dim else theirs.t(), bits, codes.shape[1])
        assert torch.equal(back.int() + (1 << (bits - 1)), (mine if dim else mine.t()).int())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, False), (8, True)])
def test_the_library_dequantizes_the_same_weight(bits, symmetric):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    quantized = random_weight(40, 96, bits, 32, symmetric=symmetric, dtype=torch.float32)
    tensors = CODECS["compressed-tensors"].encode("m", quantized, torch.float32)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    stored = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    found = PackedQuantizationCompressor.decompress(stored, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(found["weight"], quantized.dequantize())


@pytest.fixture(scope="module")
def llama():
    """A random two-block Llama and its Linears inside the blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    # Not .to(bfloat16): that would round the rotary frequencies too, which a loaded model keeps in float32.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    linears = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    return model, linears


def write_checkpoint(directory, model, quantized, schemes):
    codec = CODECS["compressed-tensors"]
    writer = ShardWriter(directory, max_shard_bytes=40_000)
    for name, weight in quantized.items():
        writer.add(codec.encode(name, weight, codec.scales_dtype(torch.bfloat16)))
    packed = {f"{name}.weight" for name in quantized}
    writer.add({name: tensor for name, tensor in model.state_dict().items() if name not in packed})
    writer.finish()
    config = json.loads(model.config.to_json_string()) | {
        "dtype": "bfloat16",
        "quantization_config": codec.quantization_config(schemes, damping=None, version="0.1.0"),
    }
    (directory / "config.json").write_text(json.dumps(config))


def uniform(scheme):
    return lambda name: scheme


def mixed(name):
    if name == "model.layers.0.mlp.down_proj":
        return None
    return (
        Scheme(8, -1, True) if "down_proj" in name else Scheme(3, 16, True) if "q_proj" in name else Scheme(4, 32, True)
    )


def load(directory, *, dequantize):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=dequantize)  # transformers' own reader, not the one ptq brings
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, quantization_config=config).eval()


@pytest.mark.parametrize(
    ("choose", "dequantize"),
    [
        (uniform(Scheme(4, 32, True)), False),
        (uniform(Scheme(8, -1, True)), False),
        (uniform(Scheme(3, 16, True)), False),
        (mixed, False),
        # transformers 5.23 cannot load asymmetric weights without being told to dequantize them
        (uniform(Scheme(4, 32, False)), True),
    ],
    ids=["sym4-g32", "sym8-channel", "sym3-g16", "mixed", "asym4-dequantized"],
)
def test_stock_transformers_computes_our_weights_exactly(llama, tmp_path, choose, dequantize):
    model, linears = llama
    schemes = {name: choose(name) for name in linears} | {"lm_head": None}
    quantized = {
        name: random_weight(*linears[name].shape, *scheme[:2], symmetric=scheme.symmetric, dtype=torch.bfloat16)
        for name, scheme in schemes.items()
        if scheme is not None
    }
    write_checkpoint(tmp_path, model, quantized, schemes)
    tokens = torch.arange(24).view(2, 12)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, weight in quantized.items():
            linears[name].copy_(weight.dequantize(torch.bfloat16))
        expected = model(tokens).logits
        model.load_state_dict(kept)
        found = load(tmp_path, dequantize=dequantize)(tokens).logits
    assert expected.isfinite().all()
    assert (found - expected).abs().max().item() == 0.0
    reader = CheckpointReader(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for name, scheme in CODECS["compressed-tensors"].parse_config(config, schemes).items():
        if scheme is not None:
            tensors = reader.tensors(CODECS["compressed-tensors"].tensor_names(name, scheme))
            decoded = CODECS["compressed-tensors"].decode(name, tensors, scheme)
            assert torch.equal(decoded.dequantize(), quantized[name].dequantize())
