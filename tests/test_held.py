"""Passes that wait. Oracle: the same module run from the start each time."""

import pytest
import torch
from tiny_models import build, run, save, settings
from torch import nn

from ptq import walk
from ptq.calibration.capture import collect_drift
from ptq.calibration.held import HeldRun, StopForward, held, let_go, rows_of

K = 16


class Block(nn.Module):
    """Three Linears one after another; counts how often each has run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(K, K) for _ in range(3))
        self.ran = []
        for name in "abc":
            getattr(self, name).register_forward_hook(lambda _m, _a, _o, name=name: self.ran.append(name))

    def forward(self, x):
        y = self.a(x).tanh()
        return x + self.c(self.b(y) * y)


def halve(linear):
    with torch.no_grad():
        linear.weight.mul_(0.5)


@pytest.mark.parametrize("wrap", [lambda run: run, HeldRun], ids=["anew", "waiting"])
def test_each_input_comes_from_what_was_changed_before_it(wrap):
    """Every Linear is changed as soon as its input is known: what is seen is what a run from the start would see."""
    block, x = Block(), torch.randn(5, K)
    waiting = wrap(lambda: block(x))
    expected = Block()
    for name in "abc":
        rows = rows_of(getattr(block, name), 1, waiting)
        assert torch.equal(rows, rows_of(getattr(expected, name), 1, lambda: expected(x)))
        halve(getattr(block, name))
        halve(getattr(expected, name))
    assert torch.equal(waiting(), expected(x))
    assert torch.equal(waiting(), expected(x))  # and again from the start


def test_a_waiting_pass_runs_every_linear_once():
    block, x = Block(), torch.randn(5, K)
    runs = [HeldRun(lambda x=x: block(x)) for x in (x, 2 * x)]
    for module in (block.a, block.b, block.c):
        for each in runs:
            rows_of(module, 1, each)
    outputs = [each() for each in runs]
    assert sorted(block.ran) == ["a", "a", "b", "b", "c", "c"]
    assert not any(output.requires_grad for output in outputs)
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_what_was_computed_can_be_forgotten():
    block, x = Block(), torch.randn(5, K)
    waiting = HeldRun(lambda: block(x))
    rows_of(block.c, 1, waiting)
    halve(block.a)  # before the place where the pass waits
    let_go([waiting, lambda: None])
    assert torch.equal(waiting(), block(x))


def test_a_linear_that_does_not_run_has_no_rows():
    block, idle, x = Block(), nn.Linear(K, K), torch.randn(5, K)
    for each in (HeldRun(lambda: block(x)), lambda: block(x)):
        assert rows_of(idle, 1, each) is None
        assert torch.equal(rows_of(block.b, 1, each), block.a(x).tanh())


def test_errors_end_the_pass_and_not_the_run():
    block, x = Block(), torch.randn(5, K)

    def fail(_module, _args):
        raise StopForward

    waiting = HeldRun(lambda: block(x))
    rows_of(block.a, 1, waiting)
    handle = block.b.register_forward_pre_hook(fail)
    with pytest.raises(StopForward):
        waiting()
    with pytest.raises(StopForward):
        rows_of(block.c, 1, waiting)
    handle.remove()
    assert torch.equal(waiting(), block(x))


def test_as_many_wait_as_there_is_room_for():
    runs = [lambda: None] * 4
    assert [isinstance(each, HeldRun) for each in held(runs, [3, 3, 3, 3], 7)] == [True, True, False, False]


def test_a_batch_that_only_one_model_feeds_leaves_no_drift():
    block, other, x = Block(), Block(), torch.randn(40, K)
    pairs = [(lambda: block(x), lambda: other(x)), (lambda: block.a(x), lambda: other(x))]
    stats, drift = collect_drift(block.b, other.b, 1, pairs, "b")
    assert stats.tokens == 40
    assert drift is None


def test_the_checkpoint_does_not_depend_on_what_waits(tmp_path, monkeypatch):
    parent = save(build("llama"), tmp_path / "parent")
    written = []
    for room in (0, 1 << 30):
        monkeypatch.setattr(walk, "HELD_BYTES", room)
        output = tmp_path / str(room)
        run(settings(parent, output))
        written.append((output / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert settings(parent, output).follows_float  # so passes of both models waited


@pytest.mark.parametrize("end", [HeldRun.let_go, HeldRun.__del__])
def test_a_pass_that_is_let_go_leaves_gradients_on(end):
    block, x = Block(), torch.randn(5, K)
    waiting = HeldRun(torch.no_grad()(lambda: block(x)))
    assert waiting.reach(block.b) is not None
    end(waiting)
    assert torch.is_grad_enabled()
    assert torch.equal(waiting(), block(x))
