"""What llama.cpp needs to know of a model, and which tensor of the file holds which of its parameters."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq.errors import ConfigError, UnsupportedModelError
from ptq.gguf.mix import FileType, Place, kind_of, wanted_kind
from ptq.gguf.words import Value

# model_type of transformers to architecture of llama.cpp, and whether that keeps the rows of queries and keys with the
# two halves of a rotary pair next to each other.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
ROPE_FACTORS = "rope_freqs.weight"


class Model(NamedTuple):
    """A model as llama.cpp sees it."""

    architecture: str
    paired_rows: bool
    blocks: int
    heads: int
    kv_heads: int
    keys: dict[str, Value]
    rope_factors: Tensor | None  # float32 [head_dim / 2]: divisors of the rotary frequencies
    notes: tuple[str, ...]


class Target(NamedTuple):
    """One tensor of the file."""

    name: str
    parameter: str  # of the model
    shape: tuple[int, ...]
    kind: str  # F32, F16 or a block format
    wanted: str  # the kind if its rows had the right length
    block: int  # -1 outside the blocks
    heads: int  # rows are reordered within so many heads; 0: they stay

    @property
    def module(self) -> str:
        """Path of the Linear of which this is the weight; of anything else the parameter itself."""
        return self.parameter.removesuffix(".weight")


def describe_model(config: Any) -> Model:
    """Keys and peculiarities of a configuration of transformers.

    Raises:
        UnsupportedModelError: another architecture, or a feature llama.cpp has no counterpart for.
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF export knows {', '.join(ARCHITECTURES)}; the model is {kind}: use llama.cpp's own converter"
        )
    architecture, paired = ARCHITECTURES[kind]
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"llama.cpp's {architecture} has the activation silu; the model's is {config.hidden_act}: it cannot be "
            "written as GGUF"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    context, notes = config.max_position_embeddings, []
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)  # where a configuration has them, a window is of these layers alone
    slides = kinds is None or "sliding_attention" in kinds
    if slides and isinstance(window, int) and window < context:
        notes.append(f"llama.cpp does not slide a window in {architecture}: its context is cut to the window, {window}")
        context = window
    keys: dict[str, Value] = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    if architecture == "llama":
        keys["rope.dimension_count"] = head_dim
    rope = dict(config.rope_parameters or {})
    keys |= _rope_keys(rope)
    factors = rope_factors(rope, head_dim) if rope.get("rope_type") == "llama3" else None
    prefixed = {f"{architecture}.{key}": value for key, value in keys.items()}
    blocks = config.num_hidden_layers
    return Model(architecture, paired, blocks, heads, kv_heads, prefixed, factors, tuple(notes))


def _rope_keys(rope: dict[str, Any]) -> dict[str, Value]:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"GGUF export knows whole rotary embeddings of type default, linear and llama3; the model has {rope}: use "
            "llama.cpp's own converter"
        )
    keys: dict[str, Value] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return keys


def rope_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Llama 3's divisors of the rotary frequencies: 1 for short waves, ``factor`` for long ones."""
    frequency = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    share: Tensor = (1 - smooth) / rope["factor"] + smooth
    return share.reciprocal().float()


def targets(
    model: Model, parameters: Iterable[tuple[str, tuple[int, ...]]], file: FileType, tied: bool
) -> list[Target]:
    """Every tensor of the file, blocks first and in order, for the model's parameters and their shapes.

    Raises:
        UnsupportedModelError: a parameter llama.cpp's architecture has no tensor for.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
    names = gguf.get_tensor_name_map(arch, model.blocks)
    shares = model.blocks == 80 and model.heads != model.kv_heads
    found = []
    for parameter, shape in parameters:
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"llama.cpp's {model.architecture} has no tensor for {parameter}: the model is not quite one of these"
            )
        block = int(name.split(".")[1]) if name.startswith("blk.") else -1
        kind = wanted = "F32"
        if len(shape) == 2:
            head = name == "output.weight" or (tied and name == "token_embd.weight")
            place = Place(name, shape[1], block, model.blocks, head, shares)
            kind, wanted = kind_of(file, place), wanted_kind(file, place)
        leaf = name.split(".")[-2]
        heads = {"attn_q": model.heads, "attn_k": model.kv_heads}.get(leaf, 0) if model.paired_rows else 0
        found.append(Target(name, parameter, shape, kind, wanted, block, heads))
    return sorted(found, key=lambda t: (t.block < 0, t.block))


def paired_rows(rows: int, heads: int) -> Tensor:
    """Order of a projection's rows that puts the two rows of each rotary pair next to each other, head by head."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def require_gguf() -> None:
    """Raise ConfigError where the gguf package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("GGUF export needs the gguf package, which is not installed: pip install gguf") from error
