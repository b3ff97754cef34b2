"""What reaches each Linear. Oracles: ``X^T X / T`` in float64, and modules that know what they do with their inputs."""

import gc

import oracles
import pytest
import torch
from torch import nn

from ptq.calibration import capture
from ptq.calibration.capture import InputGroup, collect, trace_groups
from ptq.errors import NumericsError, UnsupportedModelError
from ptq.models.structure import linears

K = 12


class Attention(nn.Module):
    """q, k, v share an input; o reads theirs; gate and up share another; the last one is never called."""

    def __init__(self):
        super().__init__()
        for name in ("o", "v", "k", "q", "up", "gate", "idle"):
            self.add_module(name, nn.Linear(K, K))

    def forward(self, x):
        o = self.o(self.q(x) * self.k(input=x) + self.v(x))
        return self.gate(o).tanh() * self.up(o)


class Loop(nn.Module):
    """One layer that runs several times, and one that reads only its first input."""

    def __init__(self):
        super().__init__()
        self.again, self.once, self.last = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x, times=3):
        y = x
        for _ in range(times):
            y = self.again(y)
        return self.last(y + self.once(x))


def named(module):
    return dict(linears(module))


def trace(module, *args, leave=()):
    return trace_groups({n: m for n, m in named(module).items() if n not in leave}, [lambda: module(*args)])


def batches(dtype=torch.float32):
    """Ragged: 3, 1 and 14 tokens, one of them with a batch dimension."""
    x = oracles.correlated_inputs(18, K).to(dtype)
    return [x[:3], x[3:4], x[4:].reshape(2, 7, K)]


def test_linears_that_share_an_input_are_found_in_order_of_execution():
    groups = trace(Attention(), torch.randn(2, K), leave=("idle",))
    assert groups == [InputGroup(("q", "k", "v")), InputGroup(("o",)), InputGroup(("gate", "up"))]


def test_a_linear_that_does_not_run_is_an_error():
    with pytest.raises(UnsupportedModelError, match="must run when calibration data does; idle did not: add them to"):
        trace(Attention(), torch.randn(2, K))


class Fresh(nn.Module):
    """Every layer reads a tensor of its own, most likely at the address of one that is gone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, K) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            layer(x * 2)
            gc.collect()
        return x


def test_reused_memory_is_not_a_shared_input():
    module, x = Fresh(), torch.randn(64, K)
    addresses = set()
    handles = [m.register_forward_pre_hook(lambda _m, a: addresses.add(a[0].data_ptr())) for m in module.layers]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    assert len(addresses) < 8  # the allocator does hand the address out again
    assert [len(group.members) for group in trace(module, x)] == [1] * 8


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x):
        x = x.clone()
        y = self.a(x)
        x.mul_(2)
        return y + self.b(x) + self.c(x[:1])


def test_a_tensor_that_was_changed_or_cut_is_another_input():
    assert [group.members for group in trace(InPlace(), torch.randn(2, K))] == [("a",), ("b",), ("c",)]


def test_inference_tensors_have_no_version_and_are_not_shared():
    with torch.inference_mode():
        x = torch.randn(2, K)
        groups = trace(Attention(), x, leave=("idle",))
    assert [group.members for group in groups[:3]] == [("q",), ("k",), ("v",)]


def test_a_layer_that_runs_again_has_all_its_inputs():
    module, x = Loop(), torch.randn(5, K)
    groups = trace(module, x)
    assert groups == [InputGroup(("again",), 3), InputGroup(("once",)), InputGroup(("last",))]
    stats = collect(named(module), groups, [lambda: module(x), lambda: module(x, times=1), lambda: module(x, times=4)])
    # the fourth round of the last call is seen as well: the run goes on to layers that come later
    assert [each.tokens for each in stats] == [5 * (3 + 1 + 4), 15, 15]


@pytest.mark.parametrize("chunk", [capture.CHUNK_ROWS, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_hessian_is_the_second_moment(dtype, chunk, monkeypatch):
    monkeypatch.setattr(capture, "CHUNK_ROWS", chunk)
    module, given = nn.Sequential(nn.Linear(K, 4)).to(dtype), batches(dtype)
    (stats,) = collect(named(module), [InputGroup(("0",))], [lambda x=x: module(x) for x in given])
    assert stats.tokens == 18
    assert stats.hessian.dtype == stats.magnitude.dtype == torch.float32
    x = torch.cat([each.reshape(-1, K) for each in given]).double()
    # float32: every product and sum of 18 tokens, and two roundings in each of at most 5 chunks, of 2**-24 each;
    # float64 inputs lose another 2 * 2**-24 on entry
    bound = (18 + 2 * 5 + 2 + 2) * 2.0**-24
    off = (stats.hessian.double() - oracles.second_moment(given)).abs()
    assert bool((off <= bound * (x.abs().T @ x.abs()) / 18).all())
    off = (stats.magnitude.double() - x.abs().mean(0)).abs()
    assert bool((off <= bound * x.abs().mean(0)).all())


def test_one_hessian_for_each_group_equals_one_for_each_linear_bit_for_bit():
    module, given = Attention(), batches()
    groups = trace(module, given[0], leave=("idle",))
    runs = [lambda x=x: module(x) for x in given]
    shared = collect(named(module), groups, runs)
    assert len(shared) == 3
    for group, stats in zip(groups, shared, strict=True):
        for member in group.members:
            (alone,) = collect(named(module), [InputGroup((member,))], runs)
            assert torch.equal(alone.hessian, stats.hessian)
            assert torch.equal(alone.magnitude, stats.magnitude)


def test_a_run_stops_when_all_has_been_seen():
    module, ran = Attention(), []
    for name, child in named(module).items():
        child.register_forward_hook(lambda _m, _a, _o, name=name: ran.append(name))
    groups = trace(module, batches()[0], leave=("idle",))
    ran.clear()
    collect(named(module), groups[:1], [lambda x=x: module(x) for x in batches()])
    assert ran == []  # q itself is not computed: its input is known before
    collect(named(module), groups[:2], [lambda: module(batches()[0])])
    assert ran == ["q", "k", "v"]
    assert all(not child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_must_be_finite(bad):
    module, x = Attention(), torch.randn(4, K)
    groups = trace(module, x, leave=("idle",))
    x[2, 3] = bad
    with pytest.raises(NumericsError, match="the input of block.3.q holds NaN or infinity: check the checkpoint"):
        collect(named(module), groups, [lambda: module(x)], where="block.3.")
    assert all(not child._forward_pre_hooks for child in module.modules())


def test_activations_whose_square_overflows_are_an_error():
    module, x = nn.Sequential(nn.Linear(K, 4)), torch.ones(4, K)
    x[0, 5] = 1e30
    with pytest.raises(NumericsError, match="the second moment of the input of block.0 must be finite; 1 of 144"):
        collect(named(module), [InputGroup(("0",))], [lambda: module(x)], where="block.")


@pytest.mark.parametrize("x", [None, torch.zeros(0, K)], ids=["never-called", "no-tokens"])
def test_a_group_that_nothing_reaches_is_an_error(x):
    module = Attention()
    with pytest.raises(UnsupportedModelError, match="nothing reached block.idle: give more samples or exclude it"):
        collect(named(module), [InputGroup(("idle",))], [] if x is None else [lambda: module.idle(x)], "block.")


def test_batches_without_tokens_change_nothing():
    module, x = nn.Sequential(nn.Linear(K, 4)), batches()[2]
    (stats,) = collect(named(module), [InputGroup(("0",))], [lambda y=y: module(y) for y in (x[:0], x, x[:0])])
    (alone,) = collect(named(module), [InputGroup(("0",))], [lambda: module(x)])
    assert stats.tokens == 14
    assert torch.equal(stats.hessian, alone.hessian)


class Beside:
    """As `Ranks` of two processes, of which the other has seen ``tokens`` tokens of every input."""

    size = 2

    def __init__(self, tokens):
        self.tokens, self.added = tokens, []

    def gather(self, own):
        return [own, [(self.tokens, K)] * len(own)]

    def add_up(self, tensor):
        self.added.append(tensor.device)


def test_a_process_that_saw_nothing_adds_up_where_the_others_do():
    """Second moments of experts lie on the host where a GPU is too small, and so must those of no tokens."""
    module = nn.Sequential(nn.Linear(K, 4, device="meta"))
    ranks, home = Beside(5), torch.device("cpu")
    (joined,) = capture._joined([None], named(module), [InputGroup(("0",))], ranks, home)
    assert joined.tokens == 5
    assert set(ranks.added) == {home}
    (joined,) = capture._joined([None], named(module), [InputGroup(("0",))], Beside(5), None)
    assert joined.hessian.device.type == "meta"
