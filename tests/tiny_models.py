"""Random models of two blocks, one for each architecture, with outlying channels and a byte tokenizer beside them."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.config import CalibrationConfig, DatasetConfig, RunConfig
from ptq.pipeline import quantize
from ptq.progress import Progress
from ptq.report import Report

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples/text/calibration.txt"
EXCERPT = ROOT / "tests/excerpt.txt"  # twelve places of it: to tokenize all takes longer than a small run
VOCABULARY = 288  # 256 bytes, two marks, and rows that no text reaches: a multiple of 32, as GPTQ files want

SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
USUAL = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**USUAL, "num_key_value_heads": 2}


class Architecture(NamedTuple):
    """A configuration of transformers, by class name and arguments, and where the blocks are."""

    config: str
    options: dict[str, Any]
    blocks: str


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", {**GROUPED, "tie_word_embeddings": False}, "model.layers"),
    "mistral": Architecture("MistralConfig", {**GROUPED, "sliding_window": 16, "head_dim": 16}, "model.layers"),
    "qwen2": Architecture("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, "model.layers"),
    "qwen3": Architecture("Qwen3Config", {**GROUPED, "head_dim": 32}, "model.layers"),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 3.0,
        },
        "model.layers",
    ),
    "phi3": Architecture("Phi3Config", GROUPED, "model.layers"),
    "opt": Architecture(
        "OPTConfig",
        {
            **SIZES,
            "hidden_size": 64,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        "model.decoder.layers",
    ),
    "gpt2": Architecture(
        "GPT2Config", {**SIZES, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, "transformer.h"
    ),
    "gpt_neox": Architecture("GPTNeoXConfig", {**USUAL, "tie_word_embeddings": False}, "gpt_neox.layers"),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model of one architecture, in memory, with the weights of `randomize`."""
    import transformers

    architecture = ARCHITECTURES[name]
    config = getattr(transformers, architecture.config)(**{**architecture.options, **changes}, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module, outliers: float = 8.0) -> None:
    """Weights that keep activations near one, biases that matter, and a few channels that norms make large."""
    generator = torch.Generator().manual_seed(0)

    def normal(parameter: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() == 2 and isinstance(module, nn.Embedding):
            parameter.copy_(normal(parameter, 2 * parameter.shape[1] ** -0.5))  # it may be the head, too
        elif parameter.dim() == 2:
            inputs = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter.shape[1]
            parameter.copy_(normal(parameter, inputs**-0.5))
        elif name.endswith("bias"):
            parameter.copy_(normal(parameter, 0.1))
        else:
            gains = torch.exp(normal(parameter, 0.3))
            gains[torch.randperm(len(gains), generator=generator)[: len(gains) // 16]] *= outliers
            parameter.copy_(gains - 1 if "Gemma" in type(module).__name__ else gains)


def tokenizer() -> Any:
    """One token a byte, 256 in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Write a model and the tokenizer, as a parent to quantize."""
    model.save_pretrained(directory, **options)
    tokenizer().save_pretrained(directory)
    return directory


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids that a text could have, int64 ``[rows, length]``."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def held_out(rows: int, length: int) -> Tensor:
    """Tokens of a text that calibration never sees, int64 ``[rows, length]``."""
    text = (TEXT.parent / "eval-novel.txt").read_text(encoding="utf-8")
    ids = tokenizer()(text[: 2 * rows * length], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: rows * length]).view(rows, length)


def settings(parent: Path, output: Path, method: str = "gptq", **changes: Any) -> RunConfig:
    """A small run: 8 sequences of 48 tokens (three tokens an input at least), groups of 32 columns."""
    text = DatasetConfig(files=(str(EXCERPT),))
    calibration = CalibrationConfig(dataset=text, samples=8, sequence_length=48, batch_size=4)
    usual: dict[str, Any] = {"group_size": 32, "calibration": calibration, "device": "cpu"}
    return RunConfig(model=str(parent), output=str(output), method=method, **{**usual, **changes})


def run(config: RunConfig, **options: Any) -> Report:
    """Quantize without a word on the terminal."""
    return quantize(config, progress=Progress(io.StringIO()), **options)


@torch.no_grad()
def logits(model: Any, batch: Tensor) -> Tensor:
    """Of a model in memory, float32 ``[B, T, vocabulary]``."""
    result: Tensor = model(input_ids=batch, use_cache=False).logits
    return result.float()


def divergence(parent: Tensor, other: Tensor) -> float:
    """Mean KL divergence of two sets of logits in nats a token."""
    p, q = torch.log_softmax(parent, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of two sets of logits."""
    return float((one - other).square().mean().sqrt())


# Error of one Linear's output, as a share of the root mean square of its row.
FLOAT32_ERROR = 16 * 2.0**-24  # at most 128 products are added up, each sum rounded once, to either side
BFLOAT16_ERROR = 2 * 2.0**-8  # two implementations each round their result
INT4_ERROR = 4 * 2.0**-8  # and torch's int4 operator the scales and the products as well


def sensitivity(model: nn.Module, batch: Tensor, error: float) -> float:
    """How far logits move (as `distance`) when every Linear errs by ``error``, at random and times three."""
    from ptq.models.structure import linears

    generator = torch.Generator().manual_seed(0)

    def disturb(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):  # of a router
            return output
        size = error * output.float().square().mean(-1, keepdim=True).sqrt()
        return output + (size * torch.randn(output.shape, generator=generator)).to(output.dtype)

    before = logits(model, batch)
    handles = [module.register_forward_hook(disturb) for _, module in linears(model)]
    after = logits(model, batch)
    for handle in handles:
        handle.remove()
    return 3 * distance(after, before)
