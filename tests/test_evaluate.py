"""Perplexity, KL and top-1. Oracle: the definitions, computed over whole sequences in float64."""

import math

import pytest
import torch
from torch import nn

from ptq import evaluate
from ptq.calibration.data import Window
from ptq.errors import DataError, NumericsError

VOCABULARY = 37


class Toy(nn.Module):
    """Logits that depend on the current token and, a little, on all earlier ones."""

    def __init__(self, seed: int, poison: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 2)
        self.poison = poison

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = self.table[input_ids].cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        return type("Output", (), {"logits": logits + self.poison})()


def windows(count: int, length: int, first_target: int = 1) -> list[Window]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(VOCABULARY, (length,), generator=generator) for _ in range(count)]
    return [Window(tokens, 1 if i == 0 else first_target) for i, tokens in enumerate(made)]


def naive(parent: Toy, other: Toy, text: list[Window]) -> tuple[float, float, float, float]:
    """(perplexity of the parent, of the other, KL, top-1) from the definitions."""
    nll_p = nll_q = kl = same = count = 0.0
    for tokens, first in text:
        p = torch.log_softmax(parent(tokens[None], use_cache=False).logits[0].double(), -1)
        q = torch.log_softmax(other(tokens[None], use_cache=False).logits[0].double(), -1)
        for t in range(first, len(tokens)):
            nll_p -= float(p[t - 1, tokens[t]])
            nll_q -= float(q[t - 1, tokens[t]])
            kl += float((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
            same += float(p[t - 1].argmax() == q[t - 1].argmax())
            count += 1
    return math.exp(nll_p / count), math.exp(nll_q / count), kl / count, same / count


@pytest.mark.parametrize("rows", [0, 3, 256])
@pytest.mark.parametrize("segment", [40, 65536])
@pytest.mark.parametrize("first_target", [1, 9])
def test_metrics_follow_their_definitions(
    monkeypatch: pytest.MonkeyPatch, rows: int, segment: int, first_target: int
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_OF_CPU", rows * VOCABULARY)
    monkeypatch.setattr(evaluate, "SEGMENT_TOKENS", segment)
    parent, other = Toy(0), Toy(1)
    text = windows(7, 16, first_target) + windows(2, 11, first_target)
    found = evaluate.compare(evaluate.in_memory(parent), {"x": evaluate.in_memory(other)}, text, batch_size=3)
    ppl_p, ppl_q, kl, top1 = naive(parent, other, text)
    # float32 log-softmax over 37 entries: a relative 1e-5 is some 80 roundings
    assert found["parent"].perplexity == pytest.approx(ppl_p, rel=1e-5)
    assert found["x"].perplexity == pytest.approx(ppl_q, rel=1e-5)
    assert found["x"].kl == pytest.approx(kl, rel=1e-5)
    assert found["x"].top1 == top1
    assert found["parent"].kl is None
    assert found["parent"].tokens == sum(len(w.tokens) - w.first_target for w in text)


def test_a_model_is_no_distance_from_itself() -> None:
    parent = Toy(0)
    found = evaluate.compare(evaluate.in_memory(parent), {"same": evaluate.in_memory(parent)}, windows(4, 16))["same"]
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert evaluate.perplexity(parent, windows(4, 16)) == found.perplexity


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one window"):
        evaluate.compare(evaluate.in_memory(Toy(0)), {}, [])


def test_broken_logits_name_the_model() -> None:
    broken = evaluate.in_memory(Toy(0, poison=math.nan))
    with pytest.raises(NumericsError, match="those of broken are NaN"):
        evaluate.compare(evaluate.in_memory(Toy(1)), {"broken": broken}, windows(1, 16))


class Masked(Toy):
    """Some tokens have no probability at all, as after a bias of -1e5 in float16."""

    def __init__(self, seed: int, tokens: list[int]) -> None:
        super().__init__(seed)
        self.mask = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor(tokens), -math.inf)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = super().forward(input_ids, use_cache).logits  # type: ignore[attr-defined]
        return type("Output", (), {"logits": logits + self.mask})()


def test_tokens_without_probability_count_nothing() -> None:
    """Oracle: the definitions over the tokens that are left, 30 of 37."""
    masked = list(range(30, 37))
    text = [Window(tokens % 30, first) for tokens, first in windows(4, 16)]
    parent, other = Masked(0, masked), Masked(1, masked)
    found = evaluate.compare(evaluate.in_memory(parent), {"x": evaluate.in_memory(other)}, text)["x"]
    kl = count = 0.0
    for tokens, first in text:
        p, q = (torch.log_softmax(m(tokens[None], use_cache=False).logits[0, :, :30].double(), -1).detach()
                for m in (parent, other))  # fmt: skip
        kl += float((p.exp() * (p - q))[first - 1 : -1].sum())
        count += len(tokens) - first
    assert found.kl == pytest.approx(kl / count, rel=1e-5)
    assert evaluate.compare(evaluate.in_memory(parent), {"x": evaluate.in_memory(Toy(1))}, text)["x"].kl > 0


def test_an_infinite_divergence_names_the_model() -> None:
    text = [Window(tokens % 30, first) for tokens, first in windows(1, 16)]
    lacks = evaluate.in_memory(Masked(1, [36]))
    with pytest.raises(NumericsError, match="the KL divergence of x to its parent must be finite, found inf"):
        evaluate.compare(evaluate.in_memory(Toy(0)), {"x": lacks}, text)
