"""How good a model is: perplexity, and how far its predictions are from its parent's.

Over the same windows of text every model predicts the same tokens. Perplexity is ``exp`` of the mean negative log
likelihood; KL is the mean of ``sum_v p log(p / q)`` in nats a token, p the parent's and q the model's distribution;
top-1 is the share of tokens for which both models hold the same token most likely. Sums are float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ptq.allocator import give_back
from ptq.errors import DataError, NumericsError
from ptq.half_products import fast_half_products
from ptq.models.streamed import StreamedModel

# Tokens whose hidden states stay in memory between two readings of a streamed model's weights.
SEGMENT_TOKENS = 65536
# Windows that run together.
BATCH = 8
# Logits turned into float32 probabilities at a time: on a CPU so few that they stay in its caches.
CHUNK, CHUNK_OF_CPU = 2**25, 2**20


class TextWindow(Protocol):
    """Tokens ``int64 [T]`` of which those from ``first_target`` on are predicted and scored."""

    @property
    def tokens(self) -> Tensor: ...  # noqa: D102
    @property
    def first_target(self) -> int: ...  # noqa: D102


class Metrics(NamedTuple):
    """Means over the scored tokens; ``kl`` and ``top1`` are None for the parent itself."""

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int


# Batches of tokens int64 [B, T] to the logits [T, V] of every sequence, in order: those of a whole batch take gigabytes
# where a vocabulary is large, and several models are compared at once.
Scorer = Callable[[Sequence[Tensor]], Iterator[Tensor]]


def in_memory(model: nn.Module) -> Scorer:
    """Scores with a model that is wholly in memory."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            with fast_half_products(device):
                logits = model(input_ids=batch.to(device), use_cache=False).logits
            yield from logits

    return score


def streamed(model: StreamedModel, alter: Callable[[nn.Module, str], Any] | None = None) -> Scorer:
    """Scores with a model that runs block by block.

    Args:
        model: streamed model.
        alter: called with every loaded block and its path before it runs (round-to-nearest as a baseline).
    """

    @torch.no_grad()
    def score(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        with fast_half_products(model.device):
            hidden = model.enter(batches)
            for index in range(len(model.blocks)):
                with model.block(index) as block:
                    if alter is not None:
                        alter(block, model.block_path(index))
                    hidden = [model.run_block(index, i, h).cpu() for i, h in enumerate(hidden)]
        give_back()
        with model.outer():
            for batch, states in zip(batches, hidden, strict=True):
                for tokens, state in zip(batch.split(1), _by_sequence(states, batch), strict=True):
                    with fast_half_products(model.device):  # not across a yield: other models are scored in between
                        logits = model.logits(tokens, state)[0]
                    yield logits

    return score


def _by_sequence(states: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
    """Hidden states of a batch ``[B, T]``, one sequence at a time.

    They are ``[B, T, ...]``, or longer than the text (CPM-Ant's prompt, ProphetNet's predictions); where a model has
    several streams of them (Gemma 3n) these may come first.
    """
    axis = int(states.shape[1:3] == batch.shape and states.shape[:2] != batch.shape)
    parts: tuple[Tensor, ...] = states.split(1, axis)
    return parts


def compare(
    parent: Scorer,
    others: Mapping[str, Scorer],
    windows: Iterable[TextWindow],
    *,
    batch_size: int = BATCH,
    name: str = "parent",
) -> dict[str, Metrics]:
    """Metrics of a parent (under its ``name``) and of every other model against it.

    Text of any length: windows are scored in segments of about 65,536 tokens.

    Raises:
        DataError: no windows.
        NumericsError: logits are NaN or infinite, or a KL divergence is.
    """
    sums = {each: _Sums() for each in (name, *others)}
    stream = iter(windows)
    while segment := _segment(stream):
        batches = [torch.stack([w.tokens for w in group]) for group in _batches(segment, batch_size)]
        scorers = [parent(batches), *(score(batches) for score in others.values())]
        for window in segment:
            logits = [next(scorer) for scorer in scorers]
            _add(sums, window, logits)
            del logits  # before the next ones are computed
    if sums[name].tokens == 0:
        raise DataError("evaluation needs at least one window of text; found none: give more text or a shorter window")
    return {each: total.metrics(each == name) for each, total in sums.items()}


def perplexity(model: nn.Module, windows: Iterable[TextWindow], *, batch_size: int = BATCH) -> float:
    """Perplexity of a model in memory over windows of text; raises as `compare`."""
    return compare(in_memory(model), {}, windows, batch_size=batch_size)["parent"].perplexity


def _segment(windows: Iterator[TextWindow]) -> list[TextWindow]:
    first = list(islice(windows, 1))
    return first + list(islice(windows, max(0, SEGMENT_TOKENS // len(first[0].tokens) - 1))) if first else []


def _batches(windows: Sequence[TextWindow], batch_size: int) -> Iterator[list[TextWindow]]:
    """Consecutive windows of equal length, so that nothing is padded."""
    batch: list[TextWindow] = []
    for window in windows:
        if batch and (len(batch) == batch_size or len(window.tokens) != len(batch[0].tokens)):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def chunk_on(device: torch.device) -> int:
    """How many logits of a model are scored at a time."""
    return CHUNK_OF_CPU if device.type == "cpu" else CHUNK


class _Sums:
    def __init__(self) -> None:
        self.nll = self.kl = 0.0
        self.same = self.tokens = 0

    def metrics(self, is_parent: bool) -> Metrics:
        mean = self.nll / self.tokens
        ppl = math.exp(mean) if mean < 700 else math.inf
        if is_parent:
            return Metrics(ppl, None, None, self.tokens)
        return Metrics(ppl, self.kl / self.tokens, self.same / self.tokens, self.tokens)


def _add(sums: Mapping[str, _Sums], window: TextWindow, logits: Sequence[Tensor]) -> None:
    """Add one window: ``logits`` ``[T, V]`` of the parent and of the others, in the order of ``sums``."""
    first = max(1, window.first_target)
    targets = window.tokens[first:].to(logits[0].device)
    rows = max(1, chunk_on(targets.device) // logits[0].shape[-1])
    for start in range(0, len(targets), rows):
        chunk = targets[start : start + rows]
        part = slice(first - 1 + start, first - 1 + start + len(chunk))
        parent = torch.log_softmax(logits[0][part].float(), -1)
        probability, top = parent.exp(), parent.max(-1).indices
        for i, (name, total) in enumerate(sums.items()):
            own = parent if i == 0 else torch.log_softmax(logits[i][part].float(), -1)
            nll = -own.gather(-1, chunk[:, None]).sum(dtype=torch.float64)
            if not bool(torch.isfinite(nll)):
                raise NumericsError(
                    f"logits must be finite; those of {name} are NaN or infinite: the checkpoint is damaged, or "
                    "its activations overflow float16 (use bfloat16 or float32)"
                )
            total.nll += float(nll)
            total.tokens += len(chunk)
            if i:
                total.kl += _divergence(parent, probability, own, name)
                total.same += int((own.max(-1).indices == top).sum())


def _divergence(parent: Tensor, probability: Tensor, own: Tensor, name: str) -> float:
    """Sum of KL divergences over rows of log probabilities; what the parent gives probability 0 counts 0."""
    terms = (parent - own).mul_(probability)
    kl = float(terms.sum(-1).sum(dtype=torch.float64))
    if math.isnan(kl):  # where 0 * log 0 came out as NaN; looking for them first takes longer than all the rest
        kl = float(terms.masked_fill_(probability == 0, 0).sum(dtype=torch.float64))
    if not math.isfinite(kl):
        raise NumericsError(
            f"the KL divergence of {name} to its parent must be finite, found {kl}: it gives probability 0 to tokens "
            "that the parent may choose; its logits overflow float16 (use bfloat16 or float32), or it is damaged"
        )
    return kl
