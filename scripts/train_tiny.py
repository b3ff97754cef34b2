"""Trains a small Qwen3 with an untied head from text files, in minutes on two cores; run by scripts/train_tiny.

Its use is to measure quantization on weights and activations that come from training, in an architecture other than
examples/tiny-llama's: norms on queries and keys, heads that are together wider than the model, a head of its own. The
tokenizer is tiny-llama's. One seed, one machine and one number of threads give the same weights.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples/tiny-llama"
LENGTH = 512  # tokens of a training sequence
BATCH = 8  # sequences of a step
PEAK_RATE = 3e-3
WARMUP = 50  # steps


def main() -> None:
    """Train, report the loss on the way, save."""
    options = _options()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    stream = tokens_of(options.files, tokenizer)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens of text")
    train(model, stream, passes=options.passes, seed=options.seed)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"written to {options.output}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/train_tiny", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.txt", help="text to train on, UTF-8")
    parser.add_argument("--output", required=True, type=Path, help="directory the model is written to")
    parser.add_argument("--passes", type=int, default=1, help="times the text is read (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default %(default)s)")
    return parser.parse_args()


def tokens_of(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The files' tokens in one row, int64 ``[T]``, each text begun with the bos token."""
    ids: list[int] = []
    for file in files:
        ids.append(tokenizer.bos_token_id)
        ids += tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= BATCH * LENGTH:
        raise SystemExit(f"training needs more than {BATCH * LENGTH} tokens, found {len(ids)}: name more text")
    return torch.tensor(ids)


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Four blocks of width 256. All Linears are divisible by the group sizes that people use (32, 64, 128)."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: nn.Module, stream: Tensor, *, passes: int, seed: int) -> None:
    """AdamW over ``passes`` readings of the text in random order, the rate warmed up and then lowered as a cosine."""
    steps = passes * (len(stream) // (BATCH * LENGTH + 1))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    started = time.perf_counter()
    model.train()
    for step, batch in enumerate(_batches(stream, passes, seed)):
        rate = PEAK_RATE * min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


def _batches(stream: Tensor, passes: int, seed: int) -> Iterator[Tensor]:
    """int64 ``[BATCH, LENGTH + 1]``: the text cut into sequences at another place in every pass, then shuffled."""
    generator = torch.Generator().manual_seed(seed)
    count = len(stream) // (BATCH * LENGTH + 1) * BATCH
    for _ in range(passes):
        offset = int(torch.randint(len(stream) - count * LENGTH, (), generator=generator))
        order = torch.randperm(count, generator=generator)
        for rows in order.split(BATCH):
            starts = offset + rows * LENGTH
            yield stream[starts[:, None] + torch.arange(LENGTH + 1)]


if __name__ == "__main__":
    main()
