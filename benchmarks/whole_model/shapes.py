"""The shapes that are timed. Only the standard library: the environment of llama.cpp reads this file too."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A decoder as Llama or Qwen3 have it; the names are those of transformers' configurations."""

    model_type: str  # "llama" or "qwen3"
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head shares the embedding's weight
    rope_theta: float

    def linears(self) -> dict[str, tuple[int, int]]:
        """``(N, K)`` of the Linears of one block, by their path in it."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def norms(self) -> dict[str, int]:
        """Width of the norms of one block, by their path in it."""
        found = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        if self.model_type == "qwen3":
            found |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        return found


SHAPES = {
    "tiny": Shape("llama", 2, 128, 256, 4, 2, 32, 256, False, 1e4),  # to try the benchmark itself
    "tiny-qwen3": Shape("qwen3", 2, 128, 256, 4, 2, 32, 256, True, 1e6),
    "llama-0.5b": Shape("llama", 28, 1024, 3072, 16, 8, 64, 8192, False, 1e4),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True, 1e6),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5),
}
