"""Writes a Q4_0 GGUF of a shape with random weights. Runs in the environment of llama.cpp: needs gguf and numpy."""

import sys
from pathlib import Path

import gguf
import numpy as np
from shapes import SHAPES, Shape

BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a float16 scale and 32 codes of 4 bits
SCALE = 0.02 / 4.6  # gives weights a standard deviation of 0.02
CONTEXT = 4096
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its GGUF name; a matrix ``(N, K)`` is stored as Q4_0, a vector as float32."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocabulary, shape.hidden)}
    for index in range(shape.layers):
        for name, size in shape.linears().items():
            found[f"blk.{index}.{NAMES[name]}.weight"] = size
        for name, width in shape.norms().items():
            found[f"blk.{index}.{NAMES[name]}.weight"] = (width,)
    found["output_norm.weight"] = (shape.hidden,)
    if not shape.tied:
        found["output.weight"] = (shape.vocabulary, shape.hidden)
    return found


def content(size: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Ones for a vector; for a matrix ``(N, K)`` the bytes ``(N, K / 32 * 18)`` of random codes with one scale."""
    if len(size) == 1:
        return np.ones(size, dtype=np.float32)
    n, k = size
    blocks = random.integers(256, size=(n, k // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(SCALE).tobytes(), dtype=np.uint8)
    return blocks.reshape(n, -1)


def add_header(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """The keys that llama.cpp wants; there is no vocabulary but its size."""
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)


def write(shape: Shape, path: Path) -> None:
    """Write the file one tensor at a time; one that exists is kept."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, shape.model_type)
    add_header(writer, shape)
    sizes = tensors(shape)
    for name, size in sizes.items():
        if len(size) == 1:
            writer.add_tensor_info(name, size, np.dtype(np.float32), size[0] * 4)
        else:
            stored = (size[0], size[1] // BLOCK * BLOCK_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for size in sizes.values():
        writer.write_tensor_data(content(size, random))
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
