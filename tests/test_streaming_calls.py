"""How a model calls its blocks: what can be run block by block, and what is refused because it cannot.

Oracles: small models that call theirs in one odd way each; the model in memory.
"""

import pytest
import torch
from test_streaming import Scaled, saved, stream_of
from tiny_models import tokens
from torch import nn

from ptq.errors import UnsupportedModelError
from ptq.evaluate import streamed


@pytest.mark.parametrize(("streams", "batch"), [(0, 2), (3, 2), (2, 2), (2, 3), (-3, 2)])
def test_several_streams_of_hidden_states(streams, batch, tmp_path):
    """``[S, B, T, H]`` as Gemma 3n has them, and ``[B, T, S, H]``. Oracle: the model in memory."""
    axis = 0 if streams > 0 else 2

    class Streams(Scaled):
        def forward(self, input_ids, use_cache):
            x = self.inner.embed(input_ids) * self.inner.gain + self.inner.shift
            parts = [x * (i + 1) for i in range(abs(streams))]
            x = torch.stack(parts, axis) if parts else x
            for layer in self.inner.layers:
                x = layer(x)
            return type("Output", (), {"logits": sum(x.unbind(axis)) if parts else x})

    torch.manual_seed(0)
    whole, ids = Streams(), tokens(batch, 5) % 16
    found = torch.stack([*streamed(stream_of(saved(whole, tmp_path), Streams()))([ids])])
    torch.testing.assert_close(found, whole(ids, False).logits)


def test_every_block_must_be_called(tmp_path):
    class Skipping(Scaled):
        def forward(self, input_ids, use_cache):
            return self.inner.layers[1](self.inner.embed(input_ids))

    stream = stream_of(saved(Skipping(), tmp_path), Skipping())
    with pytest.raises(
        UnsupportedModelError, match=r"inner.layers must be called one after another.* calls 1 of 2, 1 times in"
    ):
        stream.enter([tokens(1, 4) % 16])


def test_blocks_that_are_gone_through_twice(tmp_path):
    """As of looped models, also where the last block ends the first round."""

    class Looped(Scaled):
        def forward(self, input_ids, use_cache):
            hidden = self.inner.embed(input_ids)
            for layer in [*self.inner.layers, *self.inner.layers]:
                hidden = layer(hidden)
            return hidden

    stream = stream_of(saved(Looped(), tmp_path), Looped())
    with pytest.raises(
        UnsupportedModelError, match=r"each once; a forward pass calls 2 of 2, 4 times in all: it cannot be run block"
    ):
        stream.enter([tokens(1, 4) % 16])


def test_numbers_that_are_none_are_not_taken_for_another_order(tmp_path):
    """What comes of them is told by the solvers and the evaluation."""
    model = Scaled()
    model.inner.gain.data.fill_(torch.nan)
    stream = stream_of(saved(model, tmp_path), Scaled())
    assert bool(stream.enter([tokens(1, 4) % 16])[0].isnan().all())


def test_what_a_model_does_between_two_blocks(tmp_path):
    class Doubling(Scaled):
        def forward(self, input_ids, use_cache):
            return self.inner.layers[1](2 * self.inner.layers[0](self.inner.embed(input_ids)))

    stream = stream_of(saved(Doubling(), tmp_path), Doubling())
    with pytest.raises(UnsupportedModelError, match=r"must be what the next one receives; block 1 receives something"):
        stream.enter([tokens(1, 4) % 16])


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_exit_that_fails_matters_only_where_it_is_needed(blocks, tmp_path):
    """As that of transformers' Llama 4 without images: blocks can be quantized all the same."""

    class Ending(Scaled):
        def __init__(self):
            super().__init__()
            self.inner.layers = self.inner.layers[:blocks]

        def forward(self, input_ids, use_cache):
            return super().forward(input_ids, use_cache).image_outputs

    stream = stream_of(saved(Ending(), tmp_path), Ending())
    assert len(stream.enter([tokens(1, 4) % 16])) == 1
    with pytest.raises(AttributeError, match="image_outputs"), stream.outer():
        stream.logits(tokens(1, 4) % 16, torch.zeros(1, 4, 8))


@pytest.mark.parametrize("extra", [0, 3])
def test_hidden_states_that_are_longer_than_the_text(extra, tmp_path):
    """By a prompt, as CPM-Ant's. Oracle: the model in memory."""

    class Prompted(Scaled):
        def forward(self, input_ids, use_cache):
            x = nn.functional.pad(self.inner.embed(input_ids) * self.inner.gain, (0, 0, extra, 0), value=1.0)
            for layer in self.inner.layers:
                x = layer(x)
            return type("Output", (), {"logits": x[:, extra:]})

    torch.manual_seed(0)
    whole, ids = Prompted(), tokens(2, 5) % 16
    found = torch.stack([*streamed(stream_of(saved(whole, tmp_path), Prompted()))([ids])])
    torch.testing.assert_close(found, whole(ids, False).logits)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("dense", [0, 2])
def test_blocks_that_hand_on_more_than_hidden_states(dense, carried, used, tmp_path):
    """As ZAYA's routers do; GLM 5's need not use it. What is the same for all blocks may be handed to each.

    Also where the first ``dense`` blocks are of another kind, which does not.
    """

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden, before):
            found = self.linear(hidden) + (before if used and before is not None else 0)
            return found, found[..., :1]

    class Dense(Pair):
        def forward(self, hidden, before):
            return self.linear(hidden), None

    class Carrying(Scaled):
        def __init__(self):
            super().__init__()
            self.inner.layers = nn.ModuleList([*(Dense() for _ in range(dense)), Pair(), Pair()])

        def forward(self, input_ids, use_cache):
            hidden, before = self.inner.embed(input_ids), torch.ones(1)
            for layer in self.inner.layers:
                hidden, more = layer(hidden, before)
                before = more if carried else before
            return type("Output", (), {"logits": hidden})

    stream = stream_of(saved(Carrying(), tmp_path), Carrying())
    if carried and used:
        with pytest.raises(UnsupportedModelError, match="must receive nothing but hidden states from the one before"):
            stream.enter([tokens(1, 4) % 16])
    else:
        stream.enter([tokens(1, 4) % 16])


@pytest.mark.parametrize(("kinds", "needed"), [
    ("AABB", False), ("AABB", True), ("ACCABB", False), ("BAB", True), ("AAAA", False), ("ABAB", False),
])  # fmt: skip
@pytest.mark.parametrize("by_setting", [False, True])
def test_kinds_of_blocks_of_which_some_use_what_another_hands_on(kinds, needed, by_setting, tmp_path):
    """A hands something on and does not look at it, C hands nothing on, B looks at it: after an A it is refused."""

    class Block(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.linear, self.kind = nn.Linear(8, 8), kind
            if not by_setting:
                self.extra = nn.ModuleList(nn.Identity() for _ in range(ord(kind)))

        def forward(self, hidden, before):
            found = self.linear(hidden)
            if self.kind == "B" and (needed or before is not None):
                found = found + before
            return found, None if self.kind == "C" else found[..., :1]

    class Mixed(Scaled):
        def __init__(self):
            super().__init__()
            self.inner.layers = nn.ModuleList(map(Block, kinds))

        def forward(self, input_ids, use_cache):
            hidden, before = self.inner.embed(input_ids), torch.zeros(1)
            for layer in self.inner.layers:
                hidden, before = layer(hidden, before)
            return type("Output", (), {"logits": hidden})

    stream = stream_of(saved(Mixed(), tmp_path), Mixed())
    if "B" in kinds:
        with pytest.raises(
            UnsupportedModelError, match=r"nothing but hidden states .* block \d of this model receives"
        ):
            stream.enter([tokens(1, 4) % 16])
    else:
        stream.enter([tokens(1, 4) % 16])


EXITS = {
    "changes it in place": lambda hidden: hidden.mul_(0.5).sub_(1),
    "adds random numbers": lambda hidden: hidden + 0.1 * torch.randn_like(hidden),
    "returns a list": lambda hidden: [hidden, hidden],
    "returns integers": lambda hidden: hidden.argmax(-1),
    "returns -inf": lambda hidden: torch.full_like(hidden, -torch.inf),
}


@pytest.mark.parametrize("case", EXITS)
def test_exits_that_depend_on_the_last_block_alone(case, tmp_path):
    class Ending(Scaled):
        def forward(self, input_ids, use_cache):
            hidden = self.inner.embed(input_ids)
            for layer in self.inner.layers:
                hidden = layer(hidden)
            return type("Output", (), {"logits": EXITS[case](hidden)})

    stream_of(saved(Ending(), tmp_path), Ending()).enter([tokens(1, 4) % 16])


@pytest.mark.parametrize("early", [0, 1])
def test_what_a_model_does_after_its_blocks(early, tmp_path):
    """Its exit may not go back to what an early block returned; to what they all received it may."""

    class Skipping(Scaled):
        def forward(self, input_ids, use_cache):
            hidden = [self.inner.embed(input_ids)]
            for layer in self.inner.layers:
                hidden.append(layer(hidden[-1]))
            return type("Output", (), {"logits": hidden[-1] + 0.1 * hidden[early]})

    stream = stream_of(saved(Skipping(), tmp_path), Skipping())
    if early:
        with pytest.raises(
            UnsupportedModelError, match="must depend on what the last one returns; this model's logits"
        ):
            stream.enter([tokens(1, 4) % 16])
    else:
        stream.enter([tokens(1, 4) % 16])


def test_a_block_must_receive_hidden_states(tmp_path, monkeypatch):
    class Keyword(Scaled):
        def forward(self, input_ids, use_cache):
            return self.inner.layers[0](x=self.inner.embed(input_ids))

    stream = stream_of(saved(Keyword(), tmp_path), Keyword())
    monkeypatch.setattr("ptq.models.order._follow", lambda *arguments: None)
    with pytest.raises(UnsupportedModelError, match=r"as the first argument or as hidden_states; .* with \['x'\]"):
        stream.enter([tokens(1, 4) % 16])
